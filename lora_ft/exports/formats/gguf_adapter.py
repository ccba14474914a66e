"""The LoRA alone in GGUF: llama.cpp puts it on the base's own GGUF file (`--lora`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports._gguf.family import Family, family_of
from lora_ft.exports._plain_lora import check_linear, check_original, check_plain_lora, factors, put_back
from lora_ft.exports.publish import check_same, differences
from lora_ft.registry import EXPORTS

FILE = "adapter.gguf"
PROGRAM = "llama.cpp"
TYPES = {"float32": np.float32, "float16": np.float16}


class GgufAdapterFormat:
    """Pairs of matrices under llama.cpp's names, in its order of rows, with one alpha for all."""

    name = "gguf-adapter"
    description = "The LoRA alone as GGUF, for llama.cpp's --lora on the base's own GGUF file."
    full_precision = False
    dtypes: tuple[str, ...] = tuple(TYPES)
    targets: tuple[str, ...] = (PROGRAM,)

    def default_dtype(self, stored: str) -> str:
        """float32: it is small."""
        return "float32"

    def check(self, subject: Subject) -> None:
        """A plain LoRA on linear layers of a family that the format knows."""
        if subject.auto_class is None:
            raise UsageError("a model that a function builds cannot be written as GGUF", fix="--format peft")
        check_plain_lora(subject, PROGRAM)
        check_original(subject, PROGRAM)
        config = subject.model.config.get_text_config()
        find, blocks = family_of(config), _blocks(config)
        for name in check_linear(subject, PROGRAM):
            find.names(blocks)(f"{name}.weight")

    def write(self, artifact: Artifact, folder: Path) -> None:
        """One file."""
        config = artifact.subject.model.config.get_text_config()
        family = family_of(config)
        find = family.names(_blocks(config))
        writer: Any = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[family.arch])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_name(f"{artifact.base.rsplit('/', 1)[-1]} LoRA")
        alpha = float(artifact.subject.adapter.lora_alpha)
        writer.add_float32("adapter.lora.alpha", alpha)
        kind = TYPES[artifact.dtype]
        for name, (a, b) in factors(artifact.load_adapted()).items():
            place = find(f"{name}.weight")
            # llama.cpp multiplies with alpha / r.
            b = family.rows(f"{name}.weight", b * (a.shape[0] / alpha), config)
            writer.add_tensor(f"{place}.lora_a", a.numpy().astype(kind))
            writer.add_tensor(f"{place}.lora_b", b.contiguous().numpy().astype(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """The matrices of the file, put on the base in place of the adapter's own, give its outputs."""
        config = artifact.subject.model.config.get_text_config()
        model = artifact.load_adapted()
        try:
            put_back(model, read_factors(folder / FILE, family_of(config), config, list(factors(model))))
        except (KeyError, RuntimeError) as error:
            raise ArtifactError(f"the file does not hold what was written: {error}", where=FILE) from error
        figures = differences(model, probes, artifact.outputs)
        check_same(figures, model, FILE, exact=artifact.dtype == "float32")
        return figures


def _blocks(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", None) or config.n_layer)


def read_factors(path: Path, family: Family, config: Any, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Matrices by module, scaled, with rows in Transformers' order."""
    reader = GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    stored = {t.name: torch.from_numpy(np.array(t.data, dtype=np.float32)) for t in reader.tensors}
    find = family.names(_blocks(config))
    found = {}
    for name in names:
        place = find(f"{name}.weight")
        a, b = stored[f"{place}.lora_a"], stored[f"{place}.lora_b"]
        back = family.undo(f"{name}.weight", b, config) if family.rows is family.change else b
        found[name] = (a, back * (alpha / a.shape[0]))
    return found


EXPORTS.register(GgufAdapterFormat())
