"""Start an adapter from the weights of another run: of the same method, on the same body, whatever the head."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_ft.errors import ArtifactError
from lora_ft.models.fingerprint import fingerprint
from lora_ft.records import Listener
from lora_ft.report import public_name
from lora_ft.runs import Run
from lora_ft.training.checkpoint import ADAPTER
from lora_ft_adapters import AdapterError, state_of
from lora_ft_adapters.apply import read_config
from lora_ft_adapters.blocks import block_at, stacks
from lora_ft_adapters.modules import embedding_ends, walk
from lora_ft_adapters.plugin import WRITTEN

BODY = "base_model.model."
BODY_FACT = "body_fingerprint"  # in run.json
# Options that do not change what given tensors do to the body. Which modules have tensors is told by the tensors.
FREE = {
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "task_type", "inference_mode",
    "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
SAME_METHOD = "use the same method section as that run"


def is_free(option: str) -> bool:
    """Whether a method's option may differ between an adapter and the one that starts from it."""
    return option in FREE or "dropout" in option or option.startswith("init_")


def start_from(model: Any, source: str, fresh: tuple[str, ...], base: str, listener: Listener) -> None:
    """Overwrite the adapter's tensors with those of `source`.

    Every tensor inside the transformer blocks must be there, of the same shape, and none may be left over. New heads
    keep their own start, and so do modules outside of the blocks that the other model lacks (a pooler, the transform
    before a masked-language-model head).

    Args:
        model: PeftModel whose adapter is new.
        source: a run or an adapter folder.
        fresh: modules of the base that start at random.
        base: the recipe's model.
        listener: hears what was taken over.

    Raises:
        ArtifactError: it cannot be read, is of another method or rank, does not fit, or was trained on other weights.
    """
    folder = _folder(Path(source))
    saved = _read(folder, model.peft_config["default"], base, listener)
    _check_body(model, folder)
    wanted = state_of(model)
    found = _renamed(saved, str(getattr(model.get_base_model(), "base_model_prefix", "") or ""), wanted)
    heads = {k for k in wanted if any(f".{m}." in k for m in fresh)}
    own = _outside(model, [k for k in wanted if k not in found and k not in heads], "is not in that adapter", folder)
    used = {id(v) for v in found.values()}
    _outside(model, [k for k, v in saved.items() if id(v) not in used], "of that adapter has no place here", folder)
    wrong = [k for k, v in found.items() if v.shape != wanted[k].shape and k not in heads]
    if wrong:
        shapes = f"{tuple(found[wrong[0]].shape)}, and {tuple(wanted[wrong[0]].shape)} is needed"
        raise _misfit(f"{wrong[0]} has the shape {shapes}", folder)
    taken = {k: v for k, v in found.items() if v.shape == wanted[k].shape}
    _put(model, wanted, taken, folder)
    new = sorted(heads - taken.keys())
    parts = [f"started from {folder.parent.name}: {len(taken)} of {len(wanted)} tensors"]
    parts += [f"{len(new)} of the new head start anew"] if new else []
    parts += [f"{len(own)} outside of the blocks that it lacks start anew ({own[0]})"] if own else []
    listener.note("; ".join(parts))


def body_fingerprint(model: Any) -> str:
    """Which weights the transformer blocks and the input embedding of a PeftModel's base have, whatever its head.

    Two are comparable where the part before the colon is the same: what is quantised is hashed as it is stored, and
    float16 rounds otherwise than bfloat16.
    """
    base = model.get_base_model()
    prefix = f"{getattr(base, 'base_model_prefix', '')}."
    parts = [(b.name.removeprefix(prefix), b.module) for b in stacks(base)]
    parts += [("embedding", m) for m in embedding_ends(base)[:1] if m is not None]
    modules = [(n, m) for name, part in parts for n, m in walk(part, name)]
    named = {f"{n}.{k}": p for n, m in modules for k, p in m.named_parameters(recurse=False) if not p.requires_grad}
    kinds = {str(p.dtype).removeprefix("torch.") for p in named.values()}
    kind = "float" if kinds <= {"float32", "bfloat16"} else "+".join(sorted(kinds))
    return f"{kind}:{fingerprint(nn.ParameterDict({n.replace('.', '/'): p for n, p in named.items()}))}"


def _check_body(model: Any, folder: Path) -> None:
    """Refuse an adapter that was trained on other weights; a folder without a run beside it does not say on which."""
    known = str(Run(folder.parent).facts.get(BODY_FACT, "")) if (folder.parent / "run.json").is_file() else ""
    mine = body_fingerprint(model)
    if known != mine and known.partition(":")[0] == mine.partition(":")[0]:
        raise ArtifactError(
            "start_from: that adapter was trained on another base: names, shapes or values of its body differ",
            where=str(folder),
            why="an adapter is a change of the weights that it was trained on, and says nothing about others",
            fix="the model of that run; or its merged model as model, without start_from",
        )


def _folder(path: Path) -> Path:
    return Run(path).final.adapter if (path / "run.json").is_file() else path


def _read(folder: Path, config: Any, base: str, listener: Listener) -> dict[str, Tensor]:
    """The tensors of an adapter whose options do not contradict `config`."""
    try:
        saved, other = load_file(folder / ADAPTER), read_config(folder)
    except (OSError, SafetensorError, ValueError, AdapterError) as error:
        raise ArtifactError(f"start_from: the adapter cannot be read: {error}", where=str(folder)) from error
    ours, theirs = (str(getattr(c.peft_type, "value", c.peft_type)) for c in (config, other))
    if ours != theirs:
        raise _misfit(f"that adapter is of type {theirs}, this one of type {ours}", folder)
    for option in fields(config):
        was, now = _plain(getattr(other, option.name, None)), _plain(getattr(config, option.name))
        if was != now and not is_free(option.name) and not option.metadata.get(WRITTEN):
            why = "the rows of data.add_tokens" if option.name in ("trainable_token_indices", "token_indices") else ""
            raise _misfit(f"that adapter has {option.name}: {was}, this one {now}", folder, why)
    if other.base_model_name_or_path not in (None, "", public_name(base)):
        listener.warn(f"start_from: that adapter was trained on {other.base_model_name_or_path}, not on {base}")
    return saved


def _plain(value: Any) -> Any:
    """An option as JSON would give it back."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return getattr(value, "value", value) or None  # PEFT writes an empty pattern as {} or leaves it out


def _outside(model: Any, keys: Sequence[str], what: str, folder: Path) -> list[str]:
    """The keys, each of a module outside of the transformer blocks.

    Raises:
        ArtifactError: one belongs into a block, or has no place among the modules (a prompt, matrices that are shared).
    """
    base = model.get_base_model()
    blocks, prefix = stacks(base), str(getattr(base, "base_model_prefix", "") or "")
    for key in keys:
        name = key.removeprefix(BODY)
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        if not blocks or name == key or any(block_at(n, blocks) for n in names):
            raise _misfit(f"{len(keys)} tensors do not match; {key} {what}", folder)
    return list(keys)


def _misfit(what: str, folder: Path, why: str = "") -> ArtifactError:
    why = why or "it is of another method, has other target modules, or is on another base"
    return ArtifactError(f"start_from: {what}", where=str(folder), why=why, fix=SAME_METHOD)


def _put(model: Any, wanted: Mapping[str, Tensor], taken: Mapping[str, Tensor], folder: Path) -> None:
    prompts = model.peft_config["default"].is_prompt_learning
    try:
        set_peft_model_state_dict(model, {**wanted, **taken})
        now = state_of(model)
        lost = [k for k, v in taken.items() if not now[k].cpu().equal(v.to(now[k].dtype))]
    except (RuntimeError, KeyError) as error:
        if not prompts:
            raise
        lost = [str(error).splitlines()[0]]
    if lost or not taken:
        why = "PEFT keeps what a prompt network puts out, not the network" if prompts else ""
        raise _misfit(f"{lost[0] if lost else 'nothing'} was not taken over", folder, why)


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
