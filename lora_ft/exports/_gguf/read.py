"""A GGUF file -> a plain Transformers model, by Transformers itself, or through the way back of our table."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader, quants

from lora_ft.artifact import Artifact
from lora_ft.errors import ArtifactError

from .family import Family, family_of


def read_gguf(artifact: Artifact, path: Path) -> Any:
    """The model in float32, in evaluation mode.

    Raises:
        ArtifactError: the file cannot be read back.
    """
    config = artifact.subject.model.config.get_text_config()
    family = family_of(config)
    kind = getattr(transformers, str(artifact.subject.auto_class))
    if family.reader == "table":
        return _through_table(kind, artifact.subject.model.config, family, path)
    # Our config: the reader's own knows no llama3 frequencies, head sizes or scales of attention.
    known = {"config": copy.deepcopy(artifact.subject.model.config)} if family.reader == "config" else {}
    try:
        model: Any = kind.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32, **known)
    except (ValueError, KeyError, OSError, TypeError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError(f"Transformers cannot read the file back: {first}", where=str(path)) from error
    return model.eval()


def _through_table(kind: Any, config: Any, family: Family, path: Path) -> Any:
    model: Any = kind.from_config(copy.deepcopy(config))
    find = family.names(int(config.num_hidden_layers))
    stored = {t.name: t for t in GGUFReader(path).tensors}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if family.leave_out(name):
                continue
            if find(name) not in stored:
                raise ArtifactError(f"the file has no {find(name)}", where=str(path))
            tensor = stored[find(name)]
            value = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
            p.copy_(family.undo(name, value, config))
    return model.eval()
