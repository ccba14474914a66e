"""What is in a run, an adapter's folder or a merged model, and whether it still answers as at the end of training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_ft import exports
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports import golden
from lora_ft.models.load import load_processor
from lora_ft.models.opening import BaseSpec
from lora_ft.models.resolve import resolve
from lora_ft.records import Listener, Silent
from lora_ft.runs import Run
from lora_ft_adapters import AdapterError, load_adapter
from lora_ft_adapters.apply import read_config
from lora_ft_adapters.weights import TensorFolder, read_header, read_place

from .loading import load, prove
from .on_base import open_run
from .probing import made_up
from .rows import Given

TASKS = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification",
         "TOKEN_CLS": "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering",
         "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}  # fmt: skip


def inspect(
    path: str | Path, *, base: str | None = None, listener: Listener | None = None, given: Given | None = None
) -> dict[str, Any]:
    """What a folder holds; with a base, whether the adapter on it is the one that was trained.

    Args:
        path: a run, an adapter's folder in PEFT's layout (ours or not), or a merged model.
        base: the base to put the adapter on; "" takes the run's own.
        listener: hears what takes long.
        given: whether a run's own code may run.

    Raises:
        ArtifactError: a file is damaged, a tensor is not finite, or the answers differ.
    """
    path, listener = Path(path), listener or Silent()
    if (path / "run.json").is_file():
        run = Run(path).final
        found = {"kind": "run", "status": run.facts.get("status"), **_adapter(run.adapter, run.facts)}
        return found | (_proved(run, base, listener, given or Given()) if base is not None else {})
    if (path / "adapter_config.json").is_file():
        return _adapter(path, {}) | (_on(path, base, listener) if base else {})
    if (path / "config.json").is_file():
        return _model(path)
    raise UsageError(
        "nothing to inspect: no run.json, adapter_config.json or config.json",
        where=str(path),
        fix="give a run, an adapter's folder, or a model's",
    )


def _adapter(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Config and tensors of an adapter; `idle` names those of its modules that change nothing."""
    try:
        config = read_config(folder)
        held = read_header(folder / "adapter_model.safetensors")
    except (AdapterError, OSError, ValueError) as error:
        raise ArtifactError(str(error), where=str(folder)) from error
    golden.check_files(folder)
    zero, wrong, numbers = [], [], 0
    for name, place in held.items():
        tensor = read_place(place)
        numbers += tensor.numel()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            wrong.append(name)
        elif tensor.numel() and not bool(tensor.any()):
            zero.append(name)
    if wrong:
        raise not_finite(wrong, folder)
    told = golden.read_facts(folder)
    norms = {n: rel if rel is not None else size for n, (size, rel) in told.get("norms", {}).items()}
    idle = [n.removesuffix(".lora_B.weight") for n in zero if n.endswith(".lora_B.weight")]
    options = {k: v for k, v in config.to_dict().items() if k in SHOWN and v not in (None, {}, [], False)}
    return {
        "kind": "adapter",
        **({"kind": "run"} if facts else {}),
        "method": str(getattr(config.peft_type, "value", config.peft_type)).lower(),
        "base": config.base_model_name_or_path,
        "options": {k: sorted(v) if isinstance(v, set) else v for k, v in options.items()},
        "tensors": len(held),
        "parameters": numbers,
        "bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "idle": idle,
        "norms": norms,
        "probes": len(told.get("inputs", [])),
        "trained_in": {k: told[k] for k in ("dtype", "quant", "device") if k in told},
        "versions": told.get("versions") or {},
    }


SHOWN = (
    "r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "trainable_token_indices", "lora_dropout", "task_type",
)  # fmt: skip


def not_finite(names: list[str], folder: Path) -> ArtifactError:
    """The error for tensors with NaN or infinite numbers."""
    return ArtifactError(
        f"{len(names)} tensors hold NaN or infinite numbers, for example {names[0]}", where=str(folder)
    )


def _proved(run: Run, base: str | None, listener: Listener, given: Given) -> dict[str, Any]:
    """The run's adapter on its own base, or on another, against the answers at the end of training."""
    if not base:
        loaded = load(run, listener=listener, given=given)
        probes = prove(loaded, loaded.model, True, listener)
        return {"checked_on": loaded.recipe.model, **golden.check_golden(run.adapter, probes, same=False)}
    opened = open_run(run, listener, given)
    model = _put(run.adapter, base, str(opened.task.auto_class), listener, opened.task.model_arguments())
    prove(opened, model, False, listener)
    return {"checked_on": base, "same_answers": True}


def _on(folder: Path, base: str, listener: Listener) -> dict[str, Any]:
    """An adapter of anybody's on a base: whether it fits, and whether it changes anything."""
    config = read_config(folder)
    kind = TASKS.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    model = _put(folder, base, kind, listener, {})
    inputs = made_up(model)
    if not inputs:
        return {"checked_on": base}

    def answer(one: Any, batch: Any) -> torch.Tensor:
        out = one(**batch)
        found: torch.Tensor = out.logits if hasattr(out, "logits") else out[0]
        return found

    probes = exports.probe(model, inputs, answer)
    change = max(float((p.base - p.adapted).abs().max()) for p in probes)
    return {"checked_on": base, "largest_change_of_a_logit": change}


def _put(folder: Path, base: str, auto_class: str, listener: Listener, arguments: Mapping[str, Any]) -> Any:
    spec = BaseSpec(resolve(base, listener.note), auto_class, dict(arguments), new_head=True)
    opened = spec.open(dtype=torch.float32, device=torch.device("cpu"))
    try:
        return load_adapter(opened.model, folder)
    except AdapterError as error:
        raise ArtifactError(str(error), where=base) from error


def _model(folder: Path) -> dict[str, Any]:
    """A model in Transformers' layout."""
    try:
        tensors = TensorFolder(folder)
    except AdapterError as error:
        raise ArtifactError(str(error), where=str(folder)) from error
    wrong = [n for n in tensors if tensors.dtype(n).is_floating_point and not bool(tensors[n].isfinite().all())]
    if wrong:
        raise not_finite(wrong, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = sorted({str(tensors.dtype(n)).removeprefix("torch.") for n in tensors})
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return {
        "kind": "model",
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "quantised": (config.get("quantization_config") or {}).get("quant_method", "none"),
        "tensors": len(tensors),
        "parameters": sum(tensors.numbers(n) for n in tensors),
        "dtypes": kinds,
        "chat_template": bool(has_tokenizer and load_processor(str(folder)).chat_template),
    }
