"""Small image models pretrained on some digits, adapted to others: what each way to adapt reaches with what it trains.

    python benchmarks/digits.py [--rounds 2]

A ResNet and a ViT are trained in plain PyTorch on the digits 0 to 4 of scikit-learn's training images (see
lora_ft/data/generated/_digits.py). Then `lora_ft.train` adapts each to: the digits 5 to 9, which it never saw; all
digits inverted, from a quarter of the training rows; all digits lying on their side. Each time with a new head. Judged
on images that no training saw; the last state of a run counts. Round n has seed n, of the pretraining too. Rates were
chosen from 1e-3, 3e-3, 1e-2 and 3e-2 by the accuracy on a fifth of the training rows of 5 to 9 (`--rates`, 150
steps).
"""

import argparse
import os

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

import lora_ft
from benchmarks._side_by_side import facts, write
from lora_ft.data.generated import generators
from lora_ft.data.generated._digits import SIZE, digits, write_digits
from lora_ft.models.random_models import builders

MODELS: dict[str, dict[str, Any]] = {"tiny-resnet": {}, "tiny-vit": {"patch_size": 8}}  # what their configs change
EPOCHS = {"tiny-resnet": 6, "tiny-vit": 25}
OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
PRETRAINING = {"batch_size": 32, "learning_rate": 2e-3}
TRAIN = {"steps": 200, "batch_size": 32, "dtype": "float32", "eval_every": 10**6}
METHODS: dict[str, dict[str, Any]] = {
    "head": {"type": "head"}, "lora": {"type": "lora", "r": 8}, "houlsby": {"type": "houlsby", "r": 8},
    "full": {"type": "full"},
}  # fmt: skip
RATES = {
    "tiny-resnet": {"head": 3e-2, "lora": 3e-3, "houlsby": 1e-2, "full": 3e-3},
    "tiny-vit": {"head": 3e-2, "lora": 3e-3, "houlsby": 3e-2, "full": 3e-3},
}
GENERATED = {"inverted": ("digits-inverted-few", "digits-inverted-test"),
             "rotated": ("digits-rotated-train", "digits-rotated-test")}  # fmt: skip
SETS = ("new digits", *GENERATED)


def pretrain(name: str, folder: Path, seed: int = 0) -> Path:
    """A built-in architecture trained on the digits 0 to 4, as a folder that Transformers loads.

    Args:
        name: of the built-in random model.
        folder: gets FOLDER/NAME.
        seed: of the weights and the order.
    """
    made = folder / name
    made.mkdir(parents=True)
    builders()[name].build(made)
    processor = AutoImageProcessor.from_pretrained(made)
    images, labels = digits(test=False)
    chosen = labels < NEW[0]
    whole = [Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB") for i in images[chosen]]
    pixels, answers = processor(images=whole, return_tensors="pt")["pixel_values"], torch.tensor(labels[chosen])
    config = AutoConfig.from_pretrained(made, id2label=dict(enumerate(map(str, OLD))), **MODELS[name])
    torch.manual_seed(seed)
    model = AutoModelForImageClassification.from_config(config).train()
    size, rate = int(PRETRAINING["batch_size"]), PRETRAINING["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    steps = EPOCHS[name] * -(-len(answers) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(EPOCHS[name]):
        for rows in torch.randperm(len(answers)).split(size):
            loss = nn.functional.cross_entropy(model(pixels[rows]).logits, answers[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().save_pretrained(made)
    return made


def write_sets(folder: Path) -> dict[str, tuple[str, str]]:
    """Name -> folders of training and of test images."""
    found: dict[str, tuple[str, str]] = {}
    for name in SETS:
        places = tuple(folder / f"{name}-{part}".replace(" ", "-") for part in ("train", "test"))
        for place, test in zip(places, (False, True), strict=True):
            place.mkdir(parents=True)
            if name in GENERATED:
                generators()[GENERATED[name][test]].write(place)
            else:
                write_digits(place, test, only=NEW)
        found[name] = (str(places[0]), str(places[1]))
    return found


def adapted(base: Path, method: str, data: tuple[str, str], out: Path, seed: int = 0, **train: Any) -> dict[str, Any]:
    """One run: its accuracy before and after, and what it trained.

    Args:
        base: folder of the model.
        method: of METHODS.
        data: training and held-out rows.
        out: run folder.
        seed: of the run.
        train: keys of the recipe's section that differ.
    """
    recipe = {
        "model": str(base), "task": "image-classification", "data": {"train": data[0], "eval": data[1]},
        "method": METHODS[method], "train": {**TRAIN, "learning_rate": RATES[base.name][method], **train},
        "seed": seed,
    }  # fmt: skip
    started = time.perf_counter()
    run = lora_ft.train(recipe, out=out)
    return {
        "before": run.metrics["before"]["accuracy"], "after": run.metrics["after"]["accuracy"],
        "trainable": run.facts["trainable_parameters"], "seconds": round(time.perf_counter() - started, 1),
        "data_wait_share": run.facts["data_wait_share"],
    }  # fmt: skip


def rates(folder: Path) -> None:
    """Print the accuracy of each rate on a fifth of the training rows of the new digits."""
    train, _ = write_sets(folder / "data")["new digits"]
    for model in MODELS:
        base = pretrain(model, folder)
        for method in METHODS:
            scores = {
                rate: adapted(base, method, (train, "20%"), folder / f"{model}-{method}-{rate}", learning_rate=rate)
                for rate in (1e-3, 3e-3, 1e-2, 3e-2)
            }
            print(model, method, {rate: round(row["after"], 3) for rate, row in scores.items()}, flush=True)


def main() -> None:
    """Pretrain, adapt, write results/digits.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rates", action="store_true", help="only try learning rates, on training rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.rates:
            rates(folder)
            return
        data = write_sets(folder / "data")
        found: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
        sizes: dict[str, int] = {}
        for seed in range(args.rounds):
            for model in MODELS:
                base = pretrain(model, folder / str(seed), seed)
                sizes[model] = AutoModelForImageClassification.from_pretrained(base).base_model.num_parameters()
                for target, places in data.items():
                    for method in METHODS:
                        out = folder / f"{seed}-{model}-{target}-{method}"
                        row = adapted(base, method, places, out, seed)
                        found.setdefault(model, {}).setdefault(target, {}).setdefault(method, []).append(row)
                        print(seed, model, target, method, json.dumps(row), flush=True)
            where = write("digits", {"parameters": sizes, **_summary(found, seed + 1), **facts()})
            print(f"written to {where}", flush=True)


def _summary(found: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Means, least and most over rounds."""

    def short(rows: list[dict[str, Any]]) -> dict[str, Any]:
        after = [r["after"] for r in rows]
        return {
            "accuracy": round(statistics.mean(after), 4), "least": round(min(after), 4), "most": round(max(after), 4),
            "before": round(statistics.mean(r["before"] for r in rows), 4), "trainable": rows[0]["trainable"],
            "seconds": round(statistics.mean(r["seconds"] for r in rows), 1),
            "data_wait_share": round(statistics.mean(r["data_wait_share"] for r in rows), 4),
        }  # fmt: skip

    return {
        "rounds": rounds, "pretraining": {**PRETRAINING, "epochs": EPOCHS}, "train": TRAIN, "methods": METHODS,
        "rates": RATES,
        "rows": {name: [_count(name, test) for test in (False, True)] for name in SETS},
        "models": {m: {s: {k: short(v) for k, v in by.items()} for s, by in sets.items()} for m, sets in found.items()},
    }  # fmt: skip


def _count(name: str, test: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        train, held = write_sets(Path(folder))[name]
        return sum(1 for _ in Path(held if test else train).glob("*/*.png"))


if __name__ == "__main__":
    main()
