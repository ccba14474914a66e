"""lora-ft eval, predict, merge, unmerge, export: what is done with a finished run."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_ft.runs import Run

RunArg = Annotated[Path, typer.Argument(help="Run folder, as `lora-ft train` printed it.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
OutOption = Annotated[Path, typer.Option(help="A folder that does not exist yet.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="What numbers are written in; default as in the base's files, for GGUF of float32 files float16."
    ),
]
IntoOption = Annotated[
    str, typer.Option(help="Of a quantised base: merge into its original or dequantised weights, or the better (auto).")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-code", help="Run the Python function that a recipe names as its model.")
]
PushOption = Annotated[str | None, typer.Option(help="Upload it to this repository of the hub: USER/NAME.")]
PrivateOption = Annotated[bool, typer.Option("--private", help="With --push: a new repository is private.")]
SHOWN = 8


def evaluate(
    run: RunArg,
    data: Annotated[str | None, typer.Option(help="Rows to judge on; default the run's held-out rows.")] = None,
    trust_code: TrustOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Base against adapter on the same rows: metrics, and which rows changed."""
    from lora_ft import pipeline, report

    listener = report.make_listener()
    metrics, comparison, pairs = pipeline.evaluate_run(
        run, data=data, listener=listener, given=pipeline.Given(trust_code=trust_code)
    )
    listener.finish()
    result: dict[str, Any] = {"run": str(run), "metrics": metrics}
    if comparison:
        result |= {"gained": len(comparison.gained), "lost": len(comparison.lost), "both_right": comparison.both}
        result |= {"both_wrong": comparison.neither, "difference": comparison.difference}
        result |= {"interval_95": [comparison.low, comparison.high]}
    if as_json:
        print(json.dumps(result))
    out = sys.stderr if as_json else sys.stdout
    report.before_after(metrics, out, "base against adapter, same rows")
    if comparison:
        print(
            f"{len(comparison.gained)} rows gained, {len(comparison.lost)} lost, {comparison.both} right both times, "
            f"{comparison.neither} wrong both times; difference {comparison.difference:+.1%} "
            f"(95% interval {comparison.low:+.1%} to {comparison.high:+.1%})",
            file=out,
        )
        for title, chosen in (("lost", comparison.lost), ("gained", comparison.gained)):
            rows = [
                (Path(b.where).name, b.reference or "", b.output, a.output)
                for b, a in (pairs[i] for i in chosen[:SHOWN])
            ]
            if rows:
                report.flips(rows, out, f"{title}: {len(rows)} of {len(chosen)} rows")
        print(f"all rows: {Run(run).final.path / 'eval-rows.jsonl'}", file=out)


def predict(
    run: RunArg,
    source: Annotated[str, typer.Option("--input", help="Rows to answer, in any data format; answers may be missing.")],
    output: Annotated[Path, typer.Option(help="A .jsonl file that does not exist yet.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in an answer.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 16,
    trust_code: TrustOption = False,
) -> None:
    """Answer many rows, in batches."""
    from lora_ft import pipeline, report

    listener = report.make_listener()
    rows = pipeline.predict(
        run, source, output, max_new_tokens=max_new_tokens, batch_size=batch_size, listener=listener,
        given=pipeline.Given(trust_code=trust_code),
    )  # fmt: skip
    listener.finish()
    print(f"{rows} answers in {output}")


def merge(  # noqa: PLR0913 - one argument per option
    run: RunArg,
    out: OutOption,
    dtype: DtypeOption = None,
    into: IntoOption = "auto",
    push: PushOption = None,
    private: PrivateOption = False,
    trust_code: TrustOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Merge the adapter into its base: a plain Transformers model that needs neither us nor PEFT."""
    _export(run, out, "merged", {"dtype": dtype, "into": into, "push": push, "private": private}, trust_code, as_json)


def export(  # noqa: PLR0913 - one argument per option
    run: RunArg,
    format_name: Annotated[str, typer.Option("--format", help="See `lora-ft list exports`.")],
    out: OutOption,
    dtype: DtypeOption = None,
    into: IntoOption = "auto",
    push: PushOption = None,
    private: PrivateOption = False,
    trust_code: TrustOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the adapter in another form; nothing is published that differs from adapter on base."""
    wanted = {"dtype": dtype, "into": into, "push": push, "private": private}
    _export(run, out, format_name, wanted, trust_code, as_json)


def unmerge(
    merged: Annotated[Path, typer.Argument(help="Folder of the merged model.")],
    run: Annotated[Path, typer.Option(help="The run whose adapter is in it.")],
    out: OutOption,
    as_json: JsonFlag = False,
) -> None:
    """Take an adapter out of a merged model: the base again, up to rounding."""
    from lora_ft import pipeline, report

    listener = report.make_listener()
    figures = pipeline.unmerge(merged, run, out, listener=listener)
    listener.finish()
    if as_json:
        print(json.dumps({"out": str(out), **figures}))
        return
    print(f"base written to {out}")
    print(
        f"compared with the run's own base: tensors differ by at most {figures['weights_difference']:.1e} of their "
        f"size, logits by {figures['max_difference']:.1e}"
    )


def _export(run: Path, out: Path, format_name: str, wanted: dict[str, Any], trust_code: bool, as_json: bool) -> None:
    from lora_ft import pipeline, report

    listener = report.make_listener()
    figures = pipeline.export(
        run, out, format_name=format_name, listener=listener, given=pipeline.Given(trust_code=trust_code), **wanted
    )  # fmt: skip
    listener.finish()
    if as_json:
        print(json.dumps({"run": str(run), "out": str(out), "format": format_name, **figures}))
        return
    print(f"{format_name} written to {out}")
    print(
        f"read back and compared with the adapter on its base: largest logit difference "
        f"{figures['max_difference']:.1e}, same first choice at {figures['top1_agreement']:.1%} of positions"
    )
    if "address" in figures:
        print(f"uploaded: {figures['address']}")
    if "weights_kept" in figures:
        print(
            f"of the update, {figures['weights_kept']:.1%} is left after rounding; "
            f"least in {figures['least_kept_in']} ({figures['least_kept']:.1%})"
        )
