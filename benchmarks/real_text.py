"""Continued pretraining on text that nobody here wrote: the Python language reference that ships with Python.

    python benchmarks/real_text.py [--steps 30]

Every tenth topic of `pydoc_data.topics` is held out. Prints and writes the held-out loss and perplexity of the base
and of the adapter on it.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import lora_ft
from benchmarks._side_by_side import facts, write
from lora_ft.report import make_listener


def main() -> None:
    """Write the topics as text files, train the text preset on them, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, text) in enumerate(sorted(topics.items())):
            side = Path(folder) / ("held_out" if number % 10 == 9 else "train")
            side.mkdir(exist_ok=True)
            # One document a file: blank lines would part it.
            (side / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
        settings = [
            f"train.steps={args.steps}",
            "train.batch_size=8",
            "data.max_length=256",
            "train.learning_rate=5e-4",
        ]
        recipe = {"data": {"train": f"{folder}/train", "eval": f"{folder}/held_out"}}
        run = lora_ft.train(
            recipe, preset="text", overrides=settings, out=Path(folder) / "run", listener=make_listener()
        )
        metrics, found = run.metrics, run.facts
    for side, values in metrics.items():
        print(f"{side:7} loss {values['loss']:.4f}  perplexity {math.exp(values['loss']):.2f}")
    keys = ("tokens", "tokens_per_s", "train_s", "steps", "rows", "trainable_parameters", "dtype", "fast_path")
    print(f"written to {write('real_text', {'metrics': metrics, **{k: found[k] for k in keys}, **facts()})}")


if __name__ == "__main__":
    main()
