"""lora-ft combine, compress, convert, extract: new adapters from old ones."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lora_ft.pipeline import NewAdapter

SourceArg = Annotated[Path, typer.Argument(help="Run folder, or folder of a PEFT adapter.")]
OutOption = Annotated[Path, typer.Option(help="A folder that does not exist yet.")]
RankOption = Annotated[int | None, typer.Option("--rank", min=1, help="Most singular values kept in each module.")]
EnergyOption = Annotated[
    float | None,
    typer.Option("--energy", help="Share of the squared singular values kept in each module, for example 0.99."),
]
BaseOption = Annotated[str | None, typer.Option("--base", help="Base model; default that of the run.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
SHOWN = 5
EXACT = 1e-6  # relative; the factors are float32


def combine(  # noqa: PLR0913 - one argument per option
    sources: Annotated[list[Path], typer.Argument(help="Run folders, or folders of PEFT adapters.")],
    out: OutOption,
    weights: Annotated[str | None, typer.Option(help="One for each, such as 0.7,0.3; default equal shares.")] = None,
    how: Annotated[str, typer.Option(help="sum, cat, svd, ties, dare, dare_ties or magnitude.")] = "sum",
    rank: RankOption = None,
    density: Annotated[float, typer.Option(help="Share of entries that ties, dare and magnitude keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    base: BaseOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Several adapters of one base as one plain LoRA, exact where the rank allows."""
    from lora_ft import pipeline, report
    from lora_ft.errors import UsageError

    try:
        numbers = [float(w) for w in weights.split(",")] if weights is not None else None
    except ValueError as error:
        raise UsageError(f"--weights {weights!r} are no numbers", fix="--weights 0.7,0.3") from error
    listener = report.make_listener()
    made = pipeline.combine(
        sources, out, weights=numbers, how=how, rank=rank, density=density, seed=seed, base=base, listener=listener
    )
    listener.finish()
    _tell(made, as_json)


def compress(  # noqa: PLR0913 - one argument per option
    source: SourceArg,
    out: OutOption,
    rank: RankOption = None,
    energy: EnergyOption = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Let the held-out loss rise by at most this; rank or energy is the least tried."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows for that loss; default the run's held-out rows.")] = None,
    base: BaseOption = None,
    as_json: JsonFlag = False,
) -> None:
    """The same adapter in a lower rank, by truncated SVD of what it changes."""
    from lora_ft import pipeline, report

    listener = report.make_listener()
    made = pipeline.compress(
        source, out, rank=rank, energy=energy, tolerance=tolerance, data=data, base=base, listener=listener
    )
    listener.finish()
    _tell(made, as_json)


def convert(
    source: SourceArg,
    out: OutOption,
    rank: RankOption = None,
    energy: EnergyOption = None,
    base: BaseOption = None,
    as_json: JsonFlag = False,
) -> None:
    """An adapter of any method that can be merged as a plain LoRA; exact without --rank and --energy."""
    from lora_ft import pipeline, report

    listener = report.make_listener()
    made = pipeline.convert(source, out, rank=rank, energy=energy, base=base, listener=listener)
    listener.finish()
    _tell(made, as_json)


def extract(
    base: Annotated[str, typer.Argument(help="Base model: folder or hub id.")],
    tuned: Annotated[str, typer.Argument(help="The fully fine-tuned model: folder or hub id.")],
    out: OutOption,
    rank: RankOption = None,
    energy: EnergyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """A LoRA from a base and a fully fine-tuned model: what differs, at the rank or energy asked for."""
    from lora_ft import pipeline, report

    listener = report.make_listener()
    made = pipeline.extract(base, tuned, out, rank=rank, energy=energy, listener=listener)
    listener.finish()
    _tell(made, as_json)


def _tell(made: "NewAdapter", as_json: bool) -> None:
    if as_json:
        print(json.dumps(made.facts()))
        return
    print(f"plain LoRA written to {made.out}: {len(made.modules)} modules, rank up to {made.rank}, "
          f"{made.parameters:,} numbers")  # fmt: skip
    exact = made.error < EXACT
    print(f"relative error of the weight changes: {'none above float32 rounding' if exact else f'{made.error:.2%}'}")
    worst = sorted((m for m in made.modules if m.error > EXACT), key=lambda m: -m.error)[:SHOWN]
    for m in worst:
        print(f"  {m.error:7.2%}  rank {m.rank:<4d} {m.name}")
    print(
        f"read back and compared with what it should give: largest logit difference "
        f"{made.figures['max_difference']:.1e}, same first choice at {made.figures['top1_agreement']:.1%} of positions"
    )
    if made.losses:
        print(f"held-out loss: {made.losses[0]:.4f} whole, {made.losses[1]:.4f} compressed")
    for note in made.notes:
        print(f"note: {note}")
