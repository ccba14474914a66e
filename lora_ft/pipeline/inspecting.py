"""What is in a run, an adapter's folder or a merged model, and whether it still answers as at the end of training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_ft import exports
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports import PROBES_FILE, golden
from lora_ft.models.load import Base, load_processor
from lora_ft.models.opening import BaseSpec
from lora_ft.models.resolve import resolve
from lora_ft.records import Listener, Silent
from lora_ft.runs import Run
from lora_ft_adapters import AdapterError, load_adapter
from lora_ft_adapters.apply import read_config
from lora_ft_adapters.weights import TensorFolder, read_header, read_place

from .loading import check_base, load, prove
from .on_base import open_run
from .probing import made_up
from .ready import fit_processor
from .rows import Given

TASKS = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification",
         "TOKEN_CLS": "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering",
         "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}  # fmt: skip
LOGITS = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification")


def inspect(
    path: Run | str | Path, *, base: str | None = None, listener: Listener | None = None, given: Given | None = None
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
    asked, listener = Run.of(path), listener or Silent()
    if base is not None and (asked.path / "run.json").is_file():
        path = asked  # of a run's adapter the run knows what it answered
    path = path.path if isinstance(path, Run) else Path(path)
    if (path / "run.json").is_file():
        run = asked.final
        found = {"kind": "run", "status": run.facts.get("status"), **_adapter(run.adapter, run.facts)}
        return found | (_proved(run, base, listener, given or Given()) if base is not None else {})
    if (path / "adapter_config.json").is_file():
        if base == "":
            raise _unchecked("an adapter's folder does not say which base it is for", "--base BASE")
        return _adapter(path, {}) | (_on(path, base, listener) if base else {})
    if (path / "config.json").is_file():
        if base is not None:
            raise _unchecked("a merged model has no adapter", "leave --check and --base out")
        return _model(path)
    missing = "there is no such folder" if not path.exists() else "no run.json, adapter_config.json or config.json"
    raise ArtifactError(
        f"nothing to inspect: {missing}",
        where=str(path),
        fix="give a run, an adapter's folder, or a model's",
    )


def _unchecked(why: str, fix: str) -> UsageError:
    return UsageError("there are no answers to compare", why=why, fix=fix)


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
        figures = prove(loaded, loaded.model, golden.Form.ROUNDED, listener)  # what may differ, load has checked
        return _said(loaded.recipe.model, figures, listener)
    opened = open_run(run, listener, given)
    one = _open(base, str(opened.task.auto_class), listener, opened.task.model_arguments())
    form = _form(run.facts)
    check_base(one, run.facts, base, quantised=form is not golden.Form.REQUANTISED)
    fit_processor(one.model, opened.task, opened.processor, grow=bool(opened.recipe.data.add_tokens))
    return _said(base, prove(opened, _put(run.adapter, one, base), form, listener), listener)


def _form(facts: Mapping[str, Any]) -> golden.Form:
    """What a base in float32 has in common with that of training."""
    if facts.get("quant") != "none":
        return golden.Form.REQUANTISED
    return golden.Form.SAME if facts.get("dtype") == "float32" else golden.Form.ROUNDED


def _said(base: str, figures: Mapping[str, float], listener: Listener) -> dict[str, Any]:
    if not figures:
        listener.warn(
            "this adapter has no probes that could be compared: that it fits the base is all that was checked"
        )
    return {"checked_on": base, **({"same_answers": True} if figures else {}), **figures}


def _on(folder: Path, base: str, listener: Listener) -> dict[str, Any]:
    """An adapter of anybody's on a base: whether it fits, changes anything, and answers as far as known."""
    config = read_config(folder)
    kind = TASKS.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    model = _put(folder, _open(base, kind, listener, {}), base)
    known = kind in LOGITS and (folder / PROBES_FILE).is_file() and bool(golden.read_facts(folder))
    inputs = exports.read_probes(folder) if known else made_up(model)
    if not inputs:
        return {"checked_on": base}

    def answer(one: Any, batch: Any) -> torch.Tensor:
        out = one(**batch)
        found: torch.Tensor = out.logits if hasattr(out, "logits") else out[0]
        return found

    probes = exports.probe(model, inputs, answer)
    change = max(float((p.base - p.adapted).abs().max()) for p in probes)
    form = _form(golden.read_facts(folder))
    form = golden.Form.ROUNDED if form is golden.Form.SAME else form  # it may have trained on a GPU
    figures = golden.check_golden(folder, probes, form) if known else {}
    return {"checked_on": base, "largest_change_of_a_logit": change, **figures}


def _open(base: str, auto_class: str, listener: Listener, arguments: Mapping[str, Any]) -> Base:
    spec = BaseSpec(resolve(base, listener.note), auto_class, dict(arguments), new_head=True)
    return spec.open(dtype=torch.float32, device=torch.device("cpu"))


def _put(folder: Path, opened: Base, base: str) -> Any:
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
