"""Load processors and frozen base models through Transformers, safetensors only."""

import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig

from lora_ft.errors import ArtifactError, UnsafeError, UsageError

from .fresh import fresh_modules

# What Transformers raises for files that are missing, of another kind, corrupt, or need a package that is not there.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError)


def pick_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The base's dtype and the reason for it.

    auto is bfloat16 where the hardware multiplies it: CUDA GPUs from Ampere on, CPUs with avx512_bf16 or AMX (3.4x
    the speed of float32 on a Zen 4; on a CPU without, it is 5x slower). Everything else gets float32.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype, "as the recipe says"
    if device.type == "cuda":
        good = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        good = device.type == "cpu" and _cpu_has_bf16()
    what = f"{device.type} {'multiplies' if good else 'has no'} bfloat16"
    return (torch.bfloat16 if good else torch.float32), f"auto: {what}"


def _cpu_has_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, p, lambda: False)() for p in probes)


def load_processor(source: str, auto_class: str = "AutoTokenizer") -> Any:
    """The tokenizer or processor of `source`.

    Args:
        source: a folder or hub id.
        auto_class: AutoTokenizer, AutoImageProcessor, AutoFeatureExtractor or AutoProcessor.

    Raises:
        ArtifactError: there is none that can be read.
    """
    what = auto_class.removeprefix("Auto").lower()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of Transformers' own internals
            processor = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=False)
    except LOAD_ERRORS as error:
        found = unreachable(what, source, error)
        if auto_class != "AutoTokenizer" and Path(source).is_dir() and not isinstance(error, ImportError):
            found.fix = "put the model's preprocessor_config.json beside its weights"
        raise found from error
    tokenizer = tokenizer_of(processor)
    if tokenizer is not None and tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, so sharing the id is harmless
    return processor


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer that a processor is or holds; None where it has none."""
    found = getattr(processor, "tokenizer", processor)
    return found if hasattr(found, "get_vocab") and hasattr(found, "pad_token_id") else None


@dataclass(frozen=True)
class Base:
    """A frozen base model in evaluation mode, and the modules of it that its files do not hold."""

    model: Any
    fresh: tuple[str, ...] = ()


def load_with_new_head(
    source: str,
    auto_class: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    arguments: dict[str, Any] | None = None,
    model_arguments: dict[str, Any] | None = None,
) -> Base:
    """The same, where modules that the files lack may start at random (a classifier on a pretrained encoder).

    `Base.fresh` must be trained and saved with the adapter: name it in `modules_to_save`.

    Args:
        source, auto_class, dtype, device, arguments: as for `load_model`.
        model_arguments: as for `fitting`.
    """
    check_files(source)
    loader = getattr(transformers, auto_class)
    extra = {**(arguments or {}), **fitting(source, auto_class, model_arguments or {})}
    extra["ignore_mismatched_sizes"] = True  # other classes; what else differs in shape is refused below
    if device.type != "cpu" or arguments:
        extra["device_map"] = {"": device}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of Transformers' own internals, nothing a user can act on
            model, info = loader.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **extra
            )
    except LOAD_ERRORS as error:
        raise unreachable("model", source, error) from error
    missing = sorted({*info["missing_keys"], *_other_classes(source, model, info["mismatched_keys"])})
    fresh = fresh_modules(model, missing)
    if missing and not fresh:
        raise incomplete(model, missing, source)
    model.requires_grad_(False)
    model.eval()
    return Base(model, fresh)


def _other_classes(source: str, model: Any, mismatched: Any) -> list[str]:
    """Tensors whose first dimension is the number of classes, and which the files have for another number of them.

    Raises:
        ArtifactError: a tensor differs in another way.
    """
    more = model.config.num_labels - _config(source).num_labels if mismatched else 0
    for name, stored, wanted in mismatched:
        if tuple(stored[1:]) != tuple(wanted[1:]) or not stored or wanted[0] - stored[0] != more:
            raise ArtifactError(
                f"the tensor {name} has shape {tuple(stored)} in the files, expected {tuple(wanted)}",
                where=source,
                why="the files are of another configuration of the model",
            )
    return [name for name, _, _ in mismatched]


def fitting(source: str, auto_class: str, model_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`model_arguments` without those that this architecture does not have.

    Args:
        source: a folder or hub id.
        auto_class: name of a Transformers auto class.
        model_arguments: of the model's config, such as num_labels, or of its class, such as add_pooling_layer.
    """
    if not model_arguments:
        return {}
    config, unused = _config(source, return_unused_kwargs=True, **model_arguments)
    if not unused:
        return dict(model_arguments)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # a new head's start must not hang on this
        kind = type(getattr(transformers, auto_class).from_config(config))
    known = inspect.signature(kind.__init__).parameters
    return {k: v for k, v in model_arguments.items() if k not in unused or k in known}


def incomplete(model: nn.Module, missing: Sequence[str], source: str) -> ArtifactError:
    """The error for a model whose files lack tensors."""
    return ArtifactError(
        f"{len(missing)} tensors of a {type(model).__name__} are not in its files, for example {missing[0]}",
        where=source,
        why="they would start at random: the files are incomplete, or of a model for another task",
        fix="use a complete model of the kind that the task needs",
    )


def local_folder(source: str) -> Path:
    """Where the files of a folder or of a hub id that was loaded before are."""
    return Path(source) if Path(source).is_dir() else Path(snapshot_download(source, local_files_only=True))


def original_weights(source: str) -> Callable[[str], torch.Tensor | None]:
    """A function from a parameter's name to its value in the base's own files, before any quantisation."""
    folder = local_folder(source)
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> torch.Tensor | None:
        # A checkpoint of the bare encoder or decoder lacks the prefix that a model with a head adds.
        key = next((k for k in (name, name.split(".", 1)[-1]) if k in where), None)
        if key is None:
            return None
        with safe_open(where[key], "pt") as file:
            return cast(torch.Tensor, file.get_tensor(key))

    return read


def grow_embeddings(model: Any, tokens: int) -> int:
    """Make room for `tokens` token ids; new rows start at the mean of the old ones. Returns the rows added.

    The mean, and not Transformers' random draw, so that every load of the base gives the same rows.
    """
    embedding = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    if tokens <= rows:
        return 0
    model.resize_token_embeddings(tokens, mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for layer in {id(m): m for m in (model.get_input_embeddings(), head) if m is not None}.values():
            layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(layer.weight.dtype)
            if getattr(layer, "bias", None) is not None:
                layer.bias[rows:] = layer.bias[:rows].float().mean().to(layer.bias.dtype)
    model.requires_grad_(False)
    return tokens - rows


def check_files(source: str) -> None:
    """Refuse a local folder with pickle weights only, or whose weight index names files outside it."""
    folder = Path(source)
    if not folder.is_dir():
        return
    if not any(folder.glob("*.safetensors")):
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickles:
            raise UnsafeError(
                f"the weights are pickle files ({pickles[0]}), which run code when they are read",
                where=source,
                fix="convert them to safetensors on a machine you do not mind losing, then train",
            )
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ArtifactError("the weight index is not readable", where=str(index)) from error
        for name in names:
            if Path(name).name != name:
                raise UnsafeError(f"the weight index names a file outside the model folder: {name!r}", where=str(index))


def base_labels(source: str) -> tuple[str, ...]:
    """Names of the classes that the base's own head knows, in order; () where it has none of its own."""
    names = getattr(_config(source), "id2label", None) or {}
    found = tuple(str(names[i]) for i in sorted(names))
    return () if found == tuple(f"LABEL_{i}" for i in range(len(found))) else found


def stored_dtype(source: str) -> str:
    """Name of the dtype of the base's own files, float32 when its config does not say."""
    config = _config(source)
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or "float32"
    return str(dtype).removeprefix("torch.")


def vocabulary_rows(model: Any) -> int:
    """How many token ids the model knows."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except NotImplementedError:  # it reads no tokens, but may write them
        return int(getattr(model.config, "vocab_size", 0))


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids that the model's embedding does not have."""
    rows = vocabulary_rows(model)
    if len(tokenizer) > rows:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's embedding only {rows} rows",
            why="tokens were added to the tokenizer without resizing the model, or they do not belong together",
        )


def _config(source: str, **arguments: Any) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **arguments)
    except LOAD_ERRORS as error:
        raise unreachable("configuration", source, error) from error


def unreachable(what: str, source: str, error: Exception) -> ArtifactError:
    """What Transformers could not load, and the likely reason, as the user's error."""
    local = Path(source).exists()
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    why = "" if local else "it is no local folder, and the hub could not give it (offline, gated, or no such id)"
    fix = "check the spelling and the network, or try model: builtin:smollm2-135m-instruct"
    if local:
        missing = isinstance(error, ImportError)
        fix = "install the package that it names, or a newer Transformers" if missing else "check its files"
    return ArtifactError(f"the {what} cannot be loaded: {first[:240]}", where=source, why=why, fix=fix)
