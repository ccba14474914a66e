"""Bases whose own files are quantised, and the disk cache of bases that we quantised."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import AutoConfig

from lora_ft.cache import cache_dir, cached
from lora_ft.errors import ArtifactError, LoraFtError, UsageError

from .fingerprint import fingerprint
from .heap import freed_at_once
from .load import LOAD_ERRORS, Base, local_folder, pick_device

AREA = "quantised"
QUANTISED_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
KEPT = 4  # bases in the cache; the one that was used least lately goes
MARK = "fingerprint.txt"
CAN_UNPACK = ("bitsandbytes",)


def stored_kind(source: str) -> str:
    """How the files of a base are quantised, by Transformers' name; "" where they are not."""
    settings = _settings(source)
    return str(settings.get("quant_method") or "unknown") if settings else ""


def _settings(source: str) -> dict[str, Any]:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except LOAD_ERRORS:
        return {}  # the loader says what is wrong with it
    found = getattr(config, "quantization_config", None)
    return found if isinstance(found, dict) else found.to_dict() if found is not None else {}


def check_stored(source: str, quant: str) -> str:
    """The same, after refusing what cannot be loaded or trained; no weight is read.

    Args:
        source: folder or hub id.
        quant: what the recipe says.

    Raises:
        UsageError: it is quantised already and should be so again, a package is missing, or it cannot train.
    """
    settings = _settings(source)
    if not settings:
        return ""
    kind = str(settings.get("quant_method") or "unknown")
    if quant != "none":
        raise UsageError(
            f"quant: {quant}: the base's files are quantised already ({kind})",
            fix="quant: none takes them as they are; or name the unquantised base",
        )
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map={"": str(pick_device())})
        trains = bool(quantizer.is_trainable)
    except PackageNotFoundError as error:
        raise UsageError(f"a {kind} base needs {error.name}", fix=f"pip install {error.name}") from error
    except (ImportError, ValueError, RuntimeError, TypeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"a base quantised as {kind} cannot be used here: {first}", where=source) from error
    if not trains:
        raise UsageError(
            f"a base quantised as {kind} cannot train adapters: its products pass no gradient",
            where=source,
            fix="name the unquantised base, with quant: nf4 for little memory",
        )
    return kind


def unpacked(model: Any) -> Any:
    """A model whose files are quantised, with plain layers again.

    Raises:
        UsageError: there is no way to do that for this kind.
    """
    kind = stored_as(model)
    if kind not in CAN_UNPACK:
        raise UsageError(
            f"the base exists only as {kind}, which cannot be unpacked to merge into it",
            fix="lora-ft export --format peft, and use it on the quantised base",
        )
    for name, layer in list(model.named_modules()):
        if type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(dequantize_module_weight(layer).float(), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    for attribute in (*QUANTISED_MARKS, "_weight_conversions"):  # the last says how files hold what is quantised
        if hasattr(model, attribute):
            delattr(model, attribute)
    del model.config.quantization_config
    return model


def stored_as(model: Any) -> str:
    """How a loaded model is quantised, by Transformers' name; "" where it is not."""
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method)) if method is not None else ""


def keep_backward(model: Any) -> None:
    """Keep 4-bit weights of bitsandbytes in the layout that has a backward.

    On a CPU with avx512_bf16, bitsandbytes 0.50 repacks a 4-bit weight in the first forward in evaluation mode, for
    good, and the product with it passes no gradient: training after an evaluation would silently learn nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # It warns in each product of an 8-bit layer that activations are cast to float16; nothing a user can act on.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def from_cache(source: str, settings: dict[str, Any], load: Callable[[str | None], Base]) -> Base:
    """A quantised base, from the cache where it was before.

    Args:
        source: the base's folder or hub id.
        settings: all that the result hangs on beside the files: kind, options, dtype, versions.
        load: from the folder in the cache, or from the source for None.
    """
    key = _key(source, settings)
    folder = cache_dir() / AREA / key
    if folder.is_dir():
        found = _from_folder(folder, load)
        if found is not None:
            folder.touch()
            return found
    with freed_at_once():
        base = load(None)
    if base.fresh or not hasattr(base.model, "save_pretrained"):
        return base  # a new head is the seed's, not the base's

    def fill(target: Path) -> bool:
        if shutil.disk_usage(target).free < 4 * base.model.get_memory_footprint():
            return False
        base.model.save_pretrained(target)
        (target / MARK).write_text(fingerprint(base.model), encoding="utf-8")
        return True

    cached(AREA, key, fill)
    _prune(cache_dir() / AREA)
    return base


def _from_folder(folder: Path, load: Callable[[str | None], Base]) -> Base | None:
    """None, and the folder is gone, where what it holds is not what was written."""
    try:
        base = load(str(folder))
        if fingerprint(base.model) == (folder / MARK).read_text(encoding="utf-8"):
            return base
    except (LoraFtError, OSError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _prune(area: Path) -> None:
    entries = sorted((p for p in area.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in entries[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _key(source: str, settings: dict[str, Any]) -> str:
    folder = local_folder(source)
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json") and p.is_file()]
    if not any(p.suffix == ".safetensors" for p in files):
        raise ArtifactError("there are no safetensors files", where=source)
    listed = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    packages = {name: _version(name) for name in ("bitsandbytes", "torchao", "transformers", "torch")}
    text = json.dumps([str(folder.resolve()), listed, settings, packages], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
