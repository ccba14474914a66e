"""Parts of a pretrained body that a model for one task leaves out, kept for the next task."""

import os
from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

WEIGHTS = "model.safetensors"


def keep_body(source: str, folder: Path) -> list[str]:
    """Add to the model in `folder` what the body in `source` has beside it, such as a pooler; returns the names.

    A masked language model of BERT has no pooler, so a classifier on what it became would start with a random one.
    Heads are not added: they belong to their task.

    Args:
        source: a local folder or a hub id in the cache, from which the model in `folder` was made.
        folder: with one file of weights; a model in several is left as it is.
    """
    if not (folder / WEIGHTS).is_file():
        return []
    kind = getattr(transformers, (AutoConfig.from_pretrained(folder).architectures or [""])[0], None)
    prefix = f"{getattr(kind, 'base_model_prefix', '')}."
    tensors = load_file(folder / WEIGHTS)
    if not any(name.startswith(prefix) for name in tensors):
        return []
    known = _tensors(source)
    bare = not any(name.startswith(prefix) for name in known)  # the files of the body alone
    named = {f"{prefix}{n}" if bare else n: t for n, t in known.items()}
    like = next(t for n, t in tensors.items() if n.startswith(prefix))
    added = {n: t.to(like.dtype) for n, t in named.items() if n.startswith(prefix) and n not in tensors}
    if added:
        staged = folder / f".{WEIGHTS}.tmp"
        save_file({**tensors, **added}, staged, metadata={"format": "pt"})
        staged.chmod((folder / WEIGHTS).stat().st_mode)
        os.replace(staged, folder / WEIGHTS)
    return sorted(added)


def _tensors(source: str) -> dict[str, Tensor]:
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, local_files_only=True))
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found
