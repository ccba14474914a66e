"""Write docs/artifacts.md: the export formats from the registry, and what the benchmarks measured of them.

python -m scripts.artifacts_page
"""

import json
from pathlib import Path
from typing import Any

from lora_ft.registry import EXPORTS, QUANTIZERS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "artifacts.md"
RESULTS = ROOT / "benchmarks" / "results"


def page() -> str:
    """The whole page."""
    parts = [
        "# Artifacts",
        "Written by `python -m scripts.artifacts_page` from the registry and `benchmarks/results/`.",
        *_formats(),
        *_quantisers(),
        *_parity(),
        *_qlora(),
        *_io(),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _formats() -> list[str]:
    rows = [
        [f"`{n}`", f.description, ", ".join(f.dtypes) or "-", ", ".join(f.targets)]
        for n, f in EXPORTS.discover().items()
    ]
    return ["## Formats", _table(["--format", "what it is", "--dtype", "--target"], rows)]


def _quantisers() -> list[str]:
    rows = []
    for name, quantizer in QUANTIZERS.discover().items():
        fields = type(quantizer.options).model_fields
        rows.append(
            [f"`{name}`", quantizer.description, ", ".join(f"{k}: {f.default}" for k, f in fields.items()) or "-"]
        )
    return ["## Quantised bases", _table(["quant", "what it is", "options and defaults"], rows)]


def _read(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _cell(figures: dict[str, Any]) -> str:
    if "refused" in figures:
        return "refused"
    greedy = f", {figures['greedy']:.0%}" if "greedy" in figures else ""
    return f"{figures['relative_difference']:.0e}, {figures['top1_agreement']:.1%}{greedy}"


def _parity() -> list[str]:
    found = _read("artifacts")
    if not found:
        return []
    parts = [
        "## Parity",
        "Each cell: largest difference of a logit from the adapter on its base, as a share of the largest logit; share "
        "of positions with the same first choice; and, where a reader in Python can write text, the share of the "
        "greedy tokens of 4 held-out answers before the first difference. `python benchmarks/artifacts.py`; a small "
        "Llama, taught to recite days, months and colours, adapted to recite them backwards. Of a finished run (demo) "
        "the texts are 12 held-out answers.",
    ]
    cells: dict[str, dict[str, Any]] = {**found.get("runs", {}), **found.get("small", {})}
    columns = list(dict.fromkeys(c for v in cells.values() if "refused" not in v for c in v))
    rows = []
    for name, values in cells.items():
        if "refused" in values:
            rows.append([name, f"not trained: {values['refused']}", *[""] * (len(columns) - 1)])
        else:
            rows.append([name, *[_cell(values[c]) if c in values else "-" for c in columns]])
    parts += [_table(["method and base", *columns], rows), _limits(cells)]
    refused: dict[str, set[str]] = {}
    for values in cells.values():
        for column, figures in values.items():
            if isinstance(figures, dict) and "refused" in figures:
                refused.setdefault(column.split()[0], set()).add(figures["refused"])
    parts.append("Refused, and why:")
    parts.append("\n".join(f"- `{f}`: {'; '.join(_together(why))}" for f, why in sorted(refused.items())))
    return parts


def _limits(cells: dict[str, dict[str, Any]]) -> str:
    """Which cells are outside of what is asked of them."""
    asked = (
        ("float32 to 1e-5 of the largest logit", "float32", "relative_difference", lambda x: x <= 1e-5),
        ("first choice in bfloat16 at 99.5 %", "merged bfloat16", "top1_agreement", lambda x: x >= 0.995),
        ("greedy text of float16 GGUF at 98 %", "gguf float16", "greedy", lambda x: x >= 0.98),
    )
    told = []
    for what, column, key, good in asked:
        held = {
            f"{name}, {c}": figures[key]
            for name, values in cells.items()
            for c, figures in values.items()
            if column in c and isinstance(figures, dict) and key in figures
        }
        out = [f"{place} ({value:.3g})" for place, value in held.items() if not good(value)]
        told.append(f"{what}: {len(held) - len(out)} of {len(held)} cells" + (f"; not {', '.join(out)}" if out else ""))
    return ". ".join(["Asked and reached", *told]).replace(". ", ": ", 1) + "."


def _together(reasons: set[str]) -> list[str]:
    """One line for a reason that differs in the method's name alone."""
    names: dict[str, list[str]] = {}
    for reason in sorted(reasons):
        start, _, name = reason.partition(" and this is ")
        names.setdefault(start, []).extend([name] if name else [])
    return [f"{start} and this is {' or '.join(found)}" if found else start for start, found in names.items()]


def _qlora() -> list[str]:
    found = _read("qlora")
    if not found:
        return []
    share = "share of float32's weights"
    rows = [
        [name, f"{v['weights'] / 1e6:.0f} MB", f"{v.get(share, 1):.3f}"] for name, v in found.get("memory", {}).items()
    ]
    parts = [
        "## QLoRA on a CPU",
        "`python benchmarks/qlora.py`, SmolLM2-135M.",
        _table(["base", "weights", "share"], rows),
    ]
    load = found.get("loading", {})
    if load:
        first, second = load["first start"], load["second start"]
        parts.append(
            f"Loading {load['parameters'] / 1e6:.0f}M parameters in NF4: peak {first['peak'] / 1e6:.0f} MB, where the "
            f"quantised model and its largest tensor are {load['quantised model + largest tensor'] / 1e6:.0f} MB; "
            f"{first['seconds']:.1f} s at first, {second['seconds']:.2f} s from the cache."
        )
    parts += _trained(found.get("training", {}))
    merge = found.get("merge")
    if merge:
        said = "; ".join(f"{k} {v:.4f}" for k, v in merge.items() if k != "steps")
        parts.append(f"One NF4 file, {merge['steps']} steps, held-out loss: {said}.")
    return parts


def _trained(found: dict[str, Any]) -> list[str]:
    head = [
        "demo",
        "base and method",
        "held-out loss before",
        "after, by seed",
        "mean / float32",
        "perplexity / float32",
    ]
    rows = []
    for steps, arms in found.items():
        for arm, v in arms.items():
            if arm != "seeds":
                ratios = [f"{v[f'{what} / float32']:.{n}f}" if arm != "float32" else "1" for what, n in _RATIOS]
                rows.append([steps, arm, f"{v['before']:.3f}", " ".join(f"{x:.4f}" for x in v["after"]), *ratios])
    return [_table(head, rows)] if rows else []


_RATIOS = (("loss", 2), ("perplexity", 4))


def _io() -> list[str]:
    found = _read("io")
    if not found:
        return []
    parts = [
        "## Disk and memory",
        f"`python benchmarks/io.py`, {found['rounds']} rounds in turn, a process each, set-up but imports included. "
        "Peak is what a process has above what its imports take.",
    ]
    for model, arms in found["models"].items():
        rows = []
        for arm, v in arms.items():
            if isinstance(v, dict):
                share = v["of plain"]
                range_ = f"{share['median']:.2f} ({share['min']:.2f} - {share['max']:.2f})"
                rows.append([arm, f"{v['GB/s']:.2f}", range_, f"{v['seconds']:.3g}", f"{v['peak MB']:.0f}"])
        limit, size = arms["limit of merge's peak, MB"], arms["bytes of the base"] / 1e6
        parts.append(f"`{model}`, {size:.0f} MB; the peak of `merge` may be {limit:.0f} MB:")
        parts.append(_table(["arm", "GB/s", "of plain read and write (min - max)", "seconds", "peak MB"], rows))
    return parts


def main() -> None:
    """Write it."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
