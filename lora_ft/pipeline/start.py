"""Start an adapter from the weights of another run: of the same method, on the same body, whatever the head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_ft.errors import ArtifactError
from lora_ft.records import Listener
from lora_ft.runs import Run
from lora_ft.training.checkpoint import ADAPTER
from lora_ft_adapters import state_of

BODY = "base_model.model."


def start_from(model: Any, source: str, fresh: tuple[str, ...], listener: Listener) -> None:
    """Overwrite the adapter's tensors with those of `source`; only new heads may be missing there.

    Args:
        model: PeftModel whose adapter is new.
        source: a run or an adapter folder.
        fresh: modules of the base that start at random.
        listener: hears what was taken over.

    Raises:
        ArtifactError: it cannot be read, lacks a tensor, or one has another shape.
    """
    folder = _folder(Path(source))
    try:
        saved = load_file(folder / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"start_from: the adapter cannot be read: {error}", where=str(folder)) from error
    wanted = state_of(model)
    found = _renamed(saved, str(getattr(model.get_base_model(), "base_model_prefix", "") or ""), wanted)
    heads = {k for k in wanted if any(f".{m}." in k for m in fresh)}
    missing = [k for k in wanted if k not in found and k not in heads]
    if missing:
        raise ArtifactError(
            f"start_from: {len(missing)} of {len(wanted)} tensors are not in that adapter, for example {missing[0]}",
            where=str(folder),
            why="it is of another method, other target modules or another base",
            fix="use the same method section as that run",
        )
    wrong = [k for k, v in found.items() if v.shape != wanted[k].shape and k not in heads]
    if wrong:
        raise ArtifactError(
            f"start_from: {wrong[0]} has shape {tuple(found[wrong[0]].shape)}, this adapter needs "
            f"{tuple(wanted[wrong[0]].shape)}",
            where=str(folder),
            fix="use the same method section as that run",
        )
    taken = {k: v for k, v in found.items() if v.shape == wanted[k].shape}
    set_peft_model_state_dict(model, {**wanted, **taken})
    now = state_of(model)
    lost = [k for k, v in taken.items() if not now[k].cpu().equal(v.to(now[k].dtype))]
    if lost:
        raise ArtifactError(f"start_from: {lost[0]} was not taken over", where=str(folder))
    listener.note(f"started from {folder.parent.name}: {len(taken)} of {len(wanted)} tensors")


def _folder(path: Path) -> Path:
    return Run(path).final.adapter if (path / "run.json").is_file() else path


def _renamed(saved: Mapping[str, Tensor], prefix: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The saved tensors by this model's names: a model without a head lacks the prefix of its body."""
    with_prefix = f"{BODY}{prefix}."
    found = {}
    for key in wanted:
        other = key.replace(with_prefix, BODY) if key.startswith(with_prefix) else key.replace(BODY, with_prefix, 1)
        hit = next((k for k in (key, other) if k in saved), None)
        if hit is not None:
            found[key] = saved[hit]
    return found
