"""The inputs by which a run's artifacts are compared: kept beside the adapter, or made again from its rows."""

from pathlib import Path
from typing import Any, Protocol

import torch

from lora_ft.data import encode_all
from lora_ft.errors import ArtifactError, LoraFtError
from lora_ft.exports import PROBES_FILE, read_probes
from lora_ft.exports.golden import check_files, inputs_hash, read_facts
from lora_ft.exports.probe_file import FACTS_FILE
from lora_ft.records import Listener
from lora_ft.runs import Run

from .prepare import encode_options, workers
from .rows import Known, held_out_rows, read

MADE_UP, LENGTH = 4, 16
PROBES = "probes"  # in run.json: how many


class Runnable(Known, Protocol):
    """A finished run with its processor."""

    @property
    def processor(self) -> Any:
        """Tokenizer or processor."""


def probe_inputs(known: Runnable, model: Any, listener: Listener) -> tuple[list[dict[str, Any]], bool]:
    """(inputs, whether they are those of the golden answers).

    Args:
        known: the run.
        model: its base, for the size of its vocabulary.
        listener: hears when the run's own inputs cannot be had.
    """
    folder = known.run.adapter
    wanted = read_facts(folder).get("inputs")
    if wanted is None or (folder / PROBES_FILE).is_file():
        return read_probes(folder), wanted is not None
    found = _from_rows(known, len(wanted))
    if [inputs_hash(one) for one in found] == wanted:
        return found, True
    listener.note(
        "the probe inputs are kept as hashes alone and cannot be made again from the run's rows; artifacts are "
        "compared on made-up inputs instead of against the answers at the end of training"
    )
    return found or made_up(model), False


def _from_rows(known: Runnable, count: int) -> list[dict[str, Any]]:
    """The first held-out rows, or training rows where nothing was held out."""
    recipe, task = known.recipe, known.task
    try:
        if recipe.data.eval is not None:
            rows, source, name = held_out_rows(known)
        else:
            found = read(recipe, task, known.given)
            rows, source, name = found.training, found.source, found.format
        options = encode_options(recipe, task, recipe.model, known.run.facts["encode"]["max_length"])
        samples, _ = encode_all(
            rows[: 4 * count], task.encoder(known.processor, options), source=source, format_name=name,
            max_length=options.max_length, workers=workers(recipe, task),
        )  # fmt: skip
    except (LoraFtError, OSError):
        return []
    return task.probes(samples[:count], known.processor)


def made_up(model: Any) -> list[dict[str, Any]]:
    """Seeded token ids for a model that reads tokens; nothing for another."""
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):
        return []
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": ids[None]} for ids in torch.randint(rows, (MADE_UP, LENGTH), generator=generator)]


def check_record(run: Run) -> None:
    """Refuse an adapter whose files are not those of training, or whose answers at the end of it are gone."""
    if run.facts.get(PROBES) and not read_facts(run.adapter):
        raise ArtifactError(
            "what the adapter answered at the end of training is gone, so it cannot be compared",
            where=str(run.adapter / FACTS_FILE),
            fix="copy the run's adapter folder again",
        )
    check_files(run.adapter)


def has_probes(folder: Path) -> bool:
    """Whether an adapter's folder has anything to prove it by."""
    return (folder / PROBES_FILE).is_file() or bool(read_facts(folder))
