"""The LoRA in mlx-lm's layout (https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md)."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports._plain_lora import (
    CONVERT,
    check_linear,
    check_original,
    check_plain_lora,
    factors,
    one_rank,
    put_back,
)
from lora_ft.exports.publish import check_same, differences
from lora_ft.registry import EXPORTS

PROGRAM = "mlx-lm"
TENSORS, CONFIG = "adapters.safetensors", "adapter_config.json"
LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


class MlxFormat:
    """Matrices the other way round, one rank and one scale, and the number of last blocks that have them."""

    name = "mlx"
    description = "The LoRA as mlx-lm loads it (--adapter-path)."
    full_precision = False
    dtypes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("mlx",)

    def default_dtype(self, stored: str) -> str:
        """There is no choice."""
        return ""

    def check(self, subject: Subject) -> None:
        """A plain LoRA on the same linear layers of each of the last blocks of a model that writes text."""
        check_plain_lora(subject, PROGRAM)
        check_original(subject, PROGRAM)
        if subject.task != "causal-lm":
            raise UsageError(f"{PROGRAM} runs models that write text, and this is a {subject.task} adapter")
        names = check_linear(subject, PROGRAM)
        odd = [n for n in names if LAYER.match(n) is None]
        if odd:
            raise UsageError(f"{PROGRAM} takes LoRA inside the blocks alone, not on {odd[0]}", fix=CONVERT)
        _layout(names, len(subject.model.get_submodule("model.layers")))

    def write(self, artifact: Artifact, folder: Path) -> None:
        """The two files, and the tokenizer's."""
        found = one_rank(factors(artifact.load_adapted()))
        blocks, keys = _layout(list(found), len(artifact.subject.model.get_submodule("model.layers")))
        tensors = {}
        for name, (a, b) in found.items():
            tensors[f"{name}.lora_a"] = np.ascontiguousarray(a.numpy().T)
            tensors[f"{name}.lora_b"] = np.ascontiguousarray(b.numpy().T)
        save_file(tensors, folder / TENSORS)
        rank = next(iter(found.values()))[0].shape[0]
        config = {
            "model": artifact.base, "fine_tune_type": "lora", "num_layers": blocks,
            "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
        }  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in artifact.folder.glob("*token*"):
            shutil.copyfile(path, folder / path.name)

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """x @ lora_a @ lora_b * scale, as mlx-lm computes it, put on the base in place of the adapter."""
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        scale, tensors = float(config["lora_parameters"]["scale"]), load_file(folder / TENSORS)
        names = {n.rsplit(".", 1)[0] for n in tensors}
        read = {
            n: (torch.from_numpy(tensors[f"{n}.lora_a"].T.copy()), torch.from_numpy(tensors[f"{n}.lora_b"].T * scale))
            for n in names
        }
        model = artifact.load_adapted()
        try:
            put_back(model, read)
        except (KeyError, RuntimeError) as error:
            raise ArtifactError(f"the file does not hold what was written: {error}", where=TENSORS) from error
        figures = differences(model, probes, artifact.outputs)
        check_same(figures, model, TENSORS)
        return figures


def _layout(names: list[str], blocks: int) -> tuple[int, list[str]]:
    """(how many of the last blocks have LoRA, the layers inside a block that have it).

    Raises:
        UsageError: blocks in the middle, or different layers in different blocks.
    """
    inside: dict[int, set[str]] = {}
    for name in names:
        found = LAYER.match(name)
        assert found is not None
        inside.setdefault(int(found[1]), set()).add(found[2])
    first = min(inside)
    if set(inside) != set(range(first, blocks)) or len({frozenset(k) for k in inside.values()}) > 1:
        raise UsageError(
            f"{PROGRAM} puts LoRA on the same layers of each of the last blocks, and this adapter is on blocks "
            f"{first} to {max(inside)} of {blocks}, or on different layers in them",
            fix="target_modules without a choice of blocks, or layers:-N",
        )
    return blocks - first, sorted(inside[first])


EXPORTS.register(MlxFormat())
