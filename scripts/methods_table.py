"""Run every adapter method and write down what it can do: lora_ft/report/methods.json and docs/methods.md.

    python -m scripts.methods_table            # all methods, a few minutes
    python -m scripts.methods_table lora dora  # some
    python -m scripts.methods_table --page     # only the page, from what is known

Each row comes from running the method. tests/contract/test_methods.py runs the same and compares.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_ft_adapters import list_methods
from lora_ft_adapters.behaviour import quiet
from scripts.survey_methods import ON_QUANTISED, reference_parameters, row

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT / "lora_ft" / "report" / "methods.json"
PAGE = ROOT / "docs" / "methods.md"
MEASURED = ROOT / "benchmarks" / "results" / "methods.json"
HEAD = """# Adapter methods

Written by `python -m scripts.methods_table`, which runs every method on tiny models; `tests/contract/test_methods.py`
runs them again and compares. Use one with `method: {type: NAME, ...options}` in a recipe, or
`build_config(NAME, options, model=model)` in Python. Options are those of PEFT's config class.

Every method below, on a tiny Llama: trains only its own parameters, leaves the base bit-identical, gives the base's
outputs to the last bit when it is switched off, writes with `generate()`, and gives equal outputs after it was saved
and loaded under another adapter name, by us and by stock PEFT (by stock PEFT after `import lora_ft_adapters` and
`lora_ft_adapters.list_methods()` where marked with *). All do so in float32, and in bfloat16 with float32 adapters
unless a note says otherwise.

- **start**: a fresh adapter is a no-op, or why not. **merge**: merged outputs equal unmerged ones to 1e-5, or why not.
- **2nd**: several adapters of the method on one model. **NF4**: on a 4-bit base.
- **layers**: kinds that may be named in target_modules: L Linear, T Transformers' Conv1D, 1/2/3 Conv1d/2d/3d,
  E Embedding, A MultiheadAttention. **models**: what it trains on without being told where: E an encoder with a
  classifier, S an encoder-decoder, I an image classifier, M any nn.Module (an MLP); a causal language model always.
- **parameters** that train on SmolLM2-135M with default options (`bitfit` with `add_bias: true`, as a Llama has no
  biases, and `trainable_tokens` with three tokens; on a base with biases `bitfit` merges).
"""
COLUMNS = ("method", "what it is", "start", "merge", "2nd", "NF4", "layers", "models", "parameters")
COLUMNS = ("method", "what it is", "start", "merge", "2nd", "NF4", "layers", "models", "parameters")
LETTERS = {
    "Linear": "L", "Conv1D": "T", "Conv1d": "1", "Conv2d": "2", "Conv3d": "3", "Embedding": "E",
    "MultiheadAttention": "A", "encoder": "E", "seq2seq": "S", "image": "I", "any module": "M",
}  # fmt: skip


def render(known: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    lines = [HEAD]
    notes: list[str] = []

    def cell(what: str, value: str) -> str:
        if value == "yes":
            return "yes"
        text = f"{what}: {value}"
        if text not in notes:
            notes.append(text)
        return f"{'yes' if value.startswith('yes,') else 'no'} ({notes.index(text) + 1})"

    trained = {n: r for n, r in known.items() if "refused" not in r}
    for family in sorted({r["family"] for r in trained.values()}):
        lines += [
            f"\n## {family}\n",
            "| method | what it is | start | merge | 2nd | NF4 | layers | models | parameters |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for name, r in trained.items():
            if r["family"] != family:
                continue
            start = "no-op" if r["fresh"] == "no-op" else cell("start", r["fresh"])
            merges = cell("merge", r["merges"])
            cells = [cell(what, r[key]) for key, what in (("second", "2nd"), ("nf4", "NF4"))]
            for key, what in (("bf16", "bfloat16"), ("generate", "generate()"), ("stock", "stock PEFT")):
                cell(f"`{name}`, {what}", "yes" if r[key] == "after import" else r[key])
            kinds = ["".join(LETTERS[k] for k in r[key]) or "-" for key in ("layers", "models")]
            star = "*" if r["stock"] == "after import" else ""
            shown = [f"`{name}`{star}", r["description"], start, merges, *cells, *kinds, f"{r.get('parameters', 0):,}"]
            lines.append("| " + " | ".join(shown) + " |")
    lines += ["\n## Notes\n", *(f"{i}. {text}" for i, text in enumerate(notes, 1))]
    refused = [f"- `{n}`: {r['description']} {r['refused']}." for n, r in known.items() if "refused" in r]
    lines += ["\n## Not trained here\n", *refused]
    return "\n".join(lines) + "\n" + results()


def results() -> str:
    """What benchmarks/methods.py measured, as a table."""
    if not MEASURED.is_file():
        return ""
    held = json.loads(MEASURED.read_text())
    lines = ["\n## On a real task\n", held["about"] + "\n"]
    for title, rows in held["tables"].items():
        columns = list(rows[0])
        lines += [f"\n{title}\n", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(str(r[c]) for c in columns) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    """Survey and write."""
    known = json.loads(FACTS.read_text()) if FACTS.is_file() else {}
    wanted = [] if names == ["--page"] else names or list(list_methods())
    for name in wanted:
        facts = row(name)
        if "refused" not in facts:
            with quiet():
                facts["parameters"] = 0 if name in ON_QUANTISED else reference_parameters(name)
        known[name] = facts
        print(name, facts.get("faults", "refused"), facts.get("parameters"), flush=True)
    if "loftq" in known and "lora" in known:
        known["loftq"]["parameters"] = known["lora"]["parameters"]  # the same layers
    known = {n: known[n] for n in sorted(known) if n in list_methods()}
    FACTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(render(known))


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    main(sys.argv[1:])
