"""What each adapter method can do, found by running it on tiny models made here."""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from lora_ft.models.load import original_weights
from lora_ft.registry import QUANTIZERS
from lora_ft_adapters import AdapterError, add_adapter, build_config, count_parameters, list_methods, trainable
from lora_ft_adapters.behaviour import Calibration, behaviour_of, quiet
from lora_ft_adapters.contract import Report, Subject, check

# What a method needs to be told on the tiny models here.
OPTIONS: dict[str, dict[str, Any]] = {"trainable_tokens": {"token_indices": [5, 6, 7]}, "bitfit": {"add_bias": True}}
ROUGH = 2e-2  # of outputs in bfloat16, 8 bits of mantissa
NF4_ROUGH = 1e-3  # kernels for 4-bit weights sum in another order
ON_QUANTISED = ("loftq",)  # start from what quantisation lost


def llama(
    layers: int = 2, width: int = 32, vocabulary: int = 50, inner: int = 64, heads: tuple[int, int] = (4, 2)
) -> Any:
    """A Llama with random weights, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], vocab_size=vocabulary, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@cache
def tokens() -> dict[str, Tensor]:
    """A batch of four texts of ten tokens."""
    ids = torch.randint(3, 50, (4, 10), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text(make: Callable[[], nn.Module], **extra: Any) -> Subject:
    """A language model to try methods on."""
    batch = tokens()

    def outputs(model: Any) -> Tensor:
        return model(**batch).logits[:, -10:]

    def loss(model: Any, one: Mapping[str, Tensor]) -> Tensor:
        return model(**one, labels=one["input_ids"]).loss

    return Subject(make, outputs, loss, [dict(batch)] * 2, "CAUSAL_LM", **extra)


@cache
def _folder() -> str:
    folder = tempfile.mkdtemp()
    llama().save_pretrained(folder)
    return folder


def nf4() -> Any:
    """The same Llama with 4-bit weights."""
    quantizer = QUANTIZERS.get("nf4")
    arguments = quantizer.load_arguments(torch.float32)
    model = LlamaForCausalLM.from_pretrained(_folder(), dtype=torch.float32, device_map={"": "cpu"}, **arguments)
    quantizer.prepare(model)
    return model.eval().requires_grad_(False)


NO_LAYER = "PEFT has no layer of this method for it"


def attempt(run: Callable[[], Any]) -> str:
    """ "yes", or the reason why not."""
    try:
        faults = getattr(run(), "faults", None)
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        # What torch says of packed weights, and not PEFT or we, means that there is no layer for them.
        raw = error.__cause__ if isinstance(error, AdapterError) and error.__cause__ else error
        return _short(error) if isinstance(raw, AdapterError | ValueError) else NO_LAYER
    return _short(faults[0]) if faults else "yes"


def _short(error: Any) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    line = line.removeprefix("the adapter does not fit this model: ")
    return line if len(line) <= 110 else line[:107] + "..."


# --- layers: one module with one layer of each kind ---------------------------------------------------------------


class Around(nn.Module):
    """One layer between an input and a sum."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Any shape the layer takes."""
        out = self.layer(x, x, x) if isinstance(_plain(self.layer), nn.MultiheadAttention) else self.layer(x)
        return (out[0] if isinstance(out, tuple) else out).float()


def _plain(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else getattr(layer, "base_layer", layer)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(16, 32), (48, 16)),
    "Conv1D": (lambda: Conv1D(32, 16), (48, 16)),
    "Conv1d": (lambda: nn.Conv1d(16, 32, 3), (48, 16, 8)),
    "Conv2d": (lambda: nn.Conv2d(16, 32, 3), (4, 16, 8, 8)),
    "Conv3d": (lambda: nn.Conv3d(16, 32, 3), (4, 16, 5, 5, 5)),
    "Embedding": (lambda: nn.Embedding(50, 16), (48, 6)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (48, 6, 16)),
}


def learns(name: str, model: nn.Module, x: Any, options: Mapping[str, Any], task: str | None = None) -> None:
    """Two steps down the sum of squares; AdapterError when nothing moves."""
    given = {**OPTIONS.get(name, {}), **options}
    config = build_config(name, given, task, model)
    behaviour_of(config).prepare(config, 10)

    def run(adapted: Any, batch: Mapping[str, Any]) -> Tensor:
        out = adapted(**batch) if "x" not in batch else adapted(batch["x"])
        out = getattr(out, "logits", out)
        return (out.float() - 1).square().mean()

    batch = x if isinstance(x, dict) else {"x": x}
    adapted = add_adapter(model, config, data=Calibration([batch] * 2, run))
    optimizer = torch.optim.SGD([p for _, p in trainable(adapted)], lr=0.1)
    adapted.train()
    before = [p.detach().clone() for _, p in trainable(adapted)]
    for _ in range(2):
        run(adapted, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    if all(torch.equal(p, b) for (_, p), b in zip(trainable(adapted), before, strict=True)):
        raise AdapterError("nothing moves")


def layer_kinds(name: str) -> list[str]:
    """The kinds of layers that the method takes when they are named in target_modules."""
    if "target_modules" not in list_methods()[name].options():
        return []
    found = []
    for kind, (make, shape) in LAYERS.items():
        torch.manual_seed(0)
        x = torch.randint(0, 50, shape) if kind == "Embedding" else torch.randn(shape)
        if attempt(partial(learns, name, Around(make()), x, {"target_modules": ["layer"]})) == "yes":
            found.append(kind)
    return found


# --- tasks ----------------------------------------------------------------------------------------------------------


def _bert() -> Any:
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    return BertForSequenceClassification(config)


def _t5() -> Any:
    return T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50))


def _vit() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": 16, "patch_size": 8}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=2, num_attention_heads=4, **sizes))


def _mlp() -> Any:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 4))


def task_kinds(name: str) -> list[str]:
    """Kinds of models that the method trains on without being told which modules to take."""
    batch = tokens()
    tries: dict[str, tuple[Callable[[], Any], Any, str | None]] = {
        "encoder": (_bert, dict(batch), "SEQ_CLS"),
        "seq2seq": (_t5, {**batch, "decoder_input_ids": batch["input_ids"]}, "SEQ_2_SEQ_LM"),
        "image": (_vit, {"pixel_values": torch.randn(12, 3, 16, 16)}, None),
        "any module": (_mlp, torch.randn(48, 16), None),
    }
    found = []
    for kind, (make, x, task) in tries.items():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        if attempt(partial(learns, name, model, x, {}, task)) == "yes":
            found.append(kind)
    return found


def adapted_llama(name: str) -> Any:
    """A fresh adapter of the method on the tiny Llama, the same every time."""
    torch.manual_seed(0)
    subject = text(llama)
    model = subject.make()
    config = build_config(name, OPTIONS.get(name, {}), "CAUSAL_LM", model)
    behaviour_of(config).prepare(config, 10)
    with quiet():
        return add_adapter(model, config, data=subject.calibration())


def writes(name: str) -> None:
    """generate() with the adapter on."""
    adapted = adapted_llama(name).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        out = adapted.generate(**tokens(), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    if out.shape != (4, 13):
        raise AdapterError(f"generate gave {tuple(out.shape)}")


def reference_parameters(name: str) -> int:
    """Parameters that train on a model of the size of SmolLM2-135M, all options at their defaults.

    Counted on 3 and 4 blocks of it; 26 more are like the fourth.
    """
    counts = []
    for layers in (3, 4):
        model = llama(layers, 576, 49152, 1536, (9, 3))
        config = build_config(name, OPTIONS.get(name, {}), "CAUSAL_LM", model)
        behaviour_of(config).prepare(config, 10)
        ids = torch.randint(3, 49152, (2, 64), generator=torch.Generator().manual_seed(0))
        data = replace(text(llama), batches=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]).calibration()
        adapted = add_adapter(model, config, data=data)
        counts.append(count_parameters(adapted)[0])
    return counts[0] + 27 * (counts[1] - counts[0])


def row(name: str) -> dict[str, Any]:
    """All that is known of one method, by running it."""
    method = list_methods()[name]
    facts: dict[str, Any] = {"family": method.family, "description": method.description}
    if method.refusal:
        return {**facts, "refused": method.refusal}
    options = OPTIONS.get(name)
    quantised = text(nf4, original=original_weights(_folder()), tolerance=NF4_ROUGH, merges=False)
    with quiet():
        report: Report = check(name, quantised if name in ON_QUANTISED else text(llama), options)
        facts |= {
            "faults": report.faults,
            "fresh": report.fresh,
            "second": _short(report.second),
            "stock": report.stock,
        }
        facts["merges"] = _short(report.merges or "yes, into its dequantised base alone")
        facts["nf4"] = attempt(partial(check, name, quantised, options))
        if name in ON_QUANTISED:
            return {**facts, "bf16": "needs a quantised base", "generate": "yes", "layers": ["Linear"], "models": []}
        facts["bf16"] = attempt(partial(check, name, text(lambda: llama().bfloat16(), tolerance=ROUGH), options))
        facts["generate"] = attempt(partial(writes, name))
        facts |= {"layers": layer_kinds(name), "models": task_kinds(name)}
    return facts
