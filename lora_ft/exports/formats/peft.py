"""The adapter alone, in PEFT's layout: adapter_model.safetensors and adapter_config.json."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError
from lora_ft.exports.probe_file import OWN_FILES
from lora_ft.exports.publish import check_same, differences
from lora_ft.registry import EXPORTS
from lora_ft_adapters import AdapterError, load_adapter


class PeftFormat:
    """What stock `PeftModel.from_pretrained` loads."""

    name = "peft"
    description = "The adapter alone, as stock PeftModel.from_pretrained loads it, with the tokenizer."
    full_precision = False
    dtypes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("peft",)

    def default_dtype(self, stored: str) -> str:
        """There is no choice."""
        return ""

    def check(self, subject: Subject) -> None:
        """Every adapter has this form."""

    def write(self, artifact: Artifact, folder: Path) -> None:
        """Adapter and tokenizer, as training left them; without the probe inputs, which are the user's data."""
        for path in artifact.folder.iterdir():
            if path.is_file() and path.name not in OWN_FILES:
                shutil.copyfile(path, folder / path.name)

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """Stock PEFT, a fresh base, and the same outputs to the last bit of float32 summation."""
        try:
            model = load_adapter(artifact.load_base(), folder)  # PeftModel.from_pretrained
        except AdapterError as error:
            raise ArtifactError(str(error), where=str(folder)) from error
        figures = differences(model, probes, artifact.outputs)
        check_same(figures, model, "adapter_model.safetensors")
        return figures


EXPORTS.register(PeftFormat())
