"""The probe inputs that a run keeps beside its adapter: one small batch each, as safetensors."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_ft.errors import ArtifactError
from lora_ft.records import Batch

PROBES_FILE = "probes.safetensors"
GOLDEN_FILE, FACTS_FILE = "golden.safetensors", "probes.json"
OWN_FILES = (PROBES_FILE, GOLDEN_FILE, FACTS_FILE, "README.md")  # of an adapter's folder, not for its readers


def write_probes(folder: Path, batches: Sequence[Batch]) -> None:
    """Write batches of tensors into the folder."""
    save_file(
        {f"{i}.{name}": t.contiguous() for i, batch in enumerate(batches) for name, t in batch.items()},
        folder / PROBES_FILE,
    )


def read_probes(folder: Path) -> list[dict[str, Tensor]]:
    """The batches, in their order.

    Raises:
        ArtifactError: the file is missing or unreadable.
    """
    path = folder / PROBES_FILE
    found: dict[int, dict[str, Tensor]] = defaultdict(dict)
    try:
        for key, tensor in load_file(path).items():
            number, name = key.split(".", 1)
            found[int(number)][name] = tensor
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError("the run's probe inputs are missing or unreadable", where=str(path)) from error
    return [found[i] for i in sorted(found)]
