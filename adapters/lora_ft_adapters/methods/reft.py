"""ReFT, interventions on the residual stream after transformer blocks (Wu et al. 2024, arXiv:2404.03592).

    loreft  h + R^T (W h + b - R h)        R (r, H) with orthonormal rows
    noreft  h + W2^T (W1 h + b - W2 h)     the same without orthonormality
    direft  h + W2^T (W1 h + b)

Start, so that a fresh adapter is a no-op: W = R (W1 = W2) and b = 0; direft W1 = 0 and b = 0.
R is the Gram-Schmidt of the rows of a plain parameter (by QR, in every forward that trains), so it stays orthonormal
under any optimizer, is saved as a plain matrix, and weight decay does not act on it.

`positions` says where: "all", "f3" (first 3 tokens), "l3" (last 3 of the prompt), "f3+l3". Tokens are those that
attention_mask keeps, so padding on either side does not count. The prompt ends before the first label that is not -100
when the forward gets labels for its tokens, else with the last token. In decoding with a cache only "f" acts, on
positions below N. "f" counts from the start of the sequence whatever the prompt's length, so that training, decoding
with a cache and without one agree. "l" agrees with training only when decoding uses a cache (what generate() does).
"""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_ft_adapters.blocks import is_convolutional, stream_width
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.layer import AdapterLayer
from lora_ft_adapters.plugin import AdapterConfig, AdapterTuner, PluginType, chosen_blocks, plug_in
from lora_ft_adapters.registry import Method, register

KINDS = ("loreft", "noreft", "direft")
_IGNORE = -100


@dataclass
class ReftConfig(AdapterConfig):
    """Options of the ReFT family.

    Attributes:
        kind: loreft, noreft or direft.
        r: rank of the intervention.
        positions: all, f<N>, l<N> or f<N>+l<N>.
        dropout: probability, on the change, in training.
    """

    peft_key: ClassVar[PluginType] = PluginType("LORA_FT_REFT")

    kind: str = field(default="loreft")
    r: int = field(default=4)
    positions: str = field(default="all")
    dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.r < 1:
            raise ValueError("r must be at least 1")
        parse_positions(self.positions)


def parse_positions(text: str) -> tuple[int, int] | None:
    """(first, last) numbers of tokens; None for all.

    Raises:
        ValueError: the text is none of all, f<N>, l<N>, f<N>+l<N>.
    """
    if text == "all":
        return None
    found = re.fullmatch(r"(?:f([1-9]\d*))?(?:(?:(?<=\d)\+|^)l([1-9]\d*))?", text)
    if not text or not found:
        raise ValueError(f"positions {text!r} is none of all, f<N>, l<N>, f<N>+l<N>, for example f3+l3")
    return int(found.group(1) or 0), int(found.group(2) or 0)


@dataclass(frozen=True)
class Tokens:
    """The tokens of one forward.

    Attributes:
        index: (B, S) position among the sequence's real tokens, -1 for padding.
        prompt: (B, 1) number of real tokens in the prompt; 0 while decoding.
    """

    index: Tensor
    prompt: Tensor

    def chosen(self, first: int, last: int) -> Tensor:
        """(B, S) true at the first and last positions that were asked for."""
        i = self.index
        return (i >= 0) & ((i < first) | ((i >= self.prompt - last) & (i < self.prompt)))


class Watch:
    """What the model's forward is working on now: a hook sets `tokens` before it and takes them away after it."""

    def __init__(self) -> None:
        self.tokens: Tokens | None = None

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read tokens, mask, labels and cache from the arguments of a Transformers forward."""
        ids = kwargs.get("input_ids", args[0] if args and isinstance(args[0], Tensor) else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if isinstance(ids, Tensor):
            self.tokens = read_tokens(ids, kwargs)

    def after(self, *_: object) -> None:
        """Forget them."""
        self.tokens = None


def read_tokens(ids: Tensor, kwargs: dict[str, Any]) -> Tokens:
    """`ids` (B, S) or embeddings (B, S, H); attention_mask (B, cached + S), labels (B, S) and a cache from `kwargs`.

    Raises:
        AdapterError: a mask of another shape, from which no token can be told from padding.
    """
    batch, length = ids.shape[:2]
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, past + length, dtype=torch.long, device=ids.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < past + length:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise AdapterError(f"positions needs an attention_mask of shape {(batch, past + length)}, got {got}")
    real = mask[:, : past + length].long()
    index = torch.where(real > 0, real.cumsum(1) - 1, -1)[:, past:]
    if past:
        return Tokens(index, torch.zeros_like(index[:, :1]))
    labels = kwargs.get("labels")
    if isinstance(labels, Tensor) and labels.shape == (batch, length):
        before_answer = (labels != _IGNORE).long().cumsum(1) == 0
        real = real * before_answer.to(real.device)
    return Tokens(index, real.sum(1, keepdim=True))


def orthonormal(rows: Tensor) -> Tensor:
    """Gram-Schmidt of `rows` (r, H), r <= H, by QR; differentiable."""
    wide = rows if rows.dtype == torch.float64 else rows.float()  # there is no QR in 16 bits
    q, upper = torch.linalg.qr(wide.t())
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    result: Tensor = (q * signs.to(q.dtype)).t().to(rows.dtype)
    return result


class Reft(nn.Module):
    """R^T ((W - R) h + b): the paper's R^T (W h + b - R h) in one product less, and exactly zero at the start."""

    def __init__(self, config: ReftConfig, features: int, watch: Watch) -> None:
        super().__init__()
        if config.r > features and config.kind == "loreft":
            raise AdapterError(f"r {config.r} rows cannot be orthonormal in {features} dimensions", f"r: {features}")
        self.kind, self.positions, self.watch = config.kind, parse_positions(config.positions), watch
        start = torch.empty(config.r, features)
        nn.init.orthogonal_(start) if config.r <= features else nn.init.normal_(start, std=features**-0.5)
        self.rotate = nn.Parameter(start)
        self.learned = nn.Linear(features, config.r)
        nn.init.zeros_(self.learned.bias)
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def settle(self) -> None:
        """W = R (0 for direft), computed where the forward will run, so that W - R is exactly zero there."""
        self.learned.weight.copy_(torch.zeros_like(self.rotate) if self.kind == "direft" else self.rows())

    def rows(self) -> Tensor:
        """(r, H), orthonormal for loreft.

        Never kept between forwards: fused optimizers change a tensor without counting up its version.
        """
        return orthonormal(self.rotate) if self.kind == "loreft" else self.rotate

    def forward(self, y: Tensor, _: Any) -> Tensor:
        """y (B, S, H), the block's output; gives what to add to it."""
        rows = self.rows()
        weight = self.learned.weight if self.kind == "direft" else self.learned.weight - rows
        change = nn.functional.linear(y, weight, self.learned.bias)
        change = nn.functional.linear(self.dropout(change), rows.t())
        if self.positions is None:
            return change
        tokens = self.watch.tokens
        if tokens is None or tokens.index.shape != y.shape[:-1]:
            raise AdapterError("positions other than all need a forward of the whole model with its tokens")
        chosen = tokens.chosen(*self.positions).to(y.device)
        return torch.where(chosen.unsqueeze(-1), change, torch.zeros_like(change))


class ReftLayer(AdapterLayer):
    """A block with interventions on its output."""

    prefix = "lft_reft_"
    cannot_merge = "an intervention on the residual stream is not a weight of any one layer"

    def add(self, name: str, adapter: nn.Module) -> None:
        """As the base class; the start is computed on the device and in the dtype of the forward."""
        super().add(name, adapter)
        assert isinstance(adapter, Reft)
        adapter.settle()


class ReftTuner(AdapterTuner):
    """Interventions on the residual stream after transformer blocks."""

    prefix = ReftLayer.prefix
    tuner_layer_cls = ReftLayer

    def find(self, config: ReftConfig, model: nn.Module) -> list[str]:
        """The transformer blocks."""
        blocks = chosen_blocks(config, model)
        if any(is_convolutional(b) for b in blocks):
            raise AdapterError(f"{config.kind} edits tokens, and the blocks of this model are convolutional", "houlsby")
        return [b.name for b in blocks]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.positions != "all":
            _check_tokens(model)
        super()._prepare_model(peft_config, model)
        if "watch" not in self.__dict__:
            self.watch = Watch()
            self.hooks = [
                model.register_forward_pre_hook(self.watch.before, with_kwargs=True),
                model.register_forward_hook(self.watch.after, always_call=True),
            ]

    def build(self, config: ReftConfig, layer: AdapterLayer, name: str, adapter_name: str) -> nn.Module:
        """An intervention of the size of the residual stream."""
        return Reft(config, stream_width(self.model, name, layer.base_layer).features, self.watch)

    def release(self, layer: AdapterLayer) -> None:
        """Take the hooks away."""
        for hook in self.hooks:
            hook.remove()


def _check_tokens(model: nn.Module) -> None:
    """Refuse a model whose forward does not get the tokens that its blocks see."""
    config = getattr(model, "config", None)
    names = getattr(model, "main_input_name", None)
    if getattr(config, "is_encoder_decoder", False):
        raise AdapterError("positions other than all do not work on encoder-decoder models", "positions: all")
    if names != "input_ids":
        raise AdapterError("positions other than all need a model that takes tokens (input_ids)", "positions: all")


plug_in(ReftConfig.peft_key, ReftConfig, ReftTuner)

_DESCRIPTIONS = {
    "loreft": "Low-rank edits of the residual stream in an orthonormal subspace (Wu et al. 2024).",
    "noreft": "LoReFT without the orthonormality: less work per token (Wu et al. 2024).",
    "direft": "Low-rank additions to the residual stream, the cheapest of the ReFT family (Wu et al. 2024).",
}
for _kind, _description in _DESCRIPTIONS.items():
    register(
        Method(
            name=_kind,
            description=_description,
            config_class=ReftConfig,
            fixed={"kind": _kind},
            targets=None,
            family="representation",
        )
    )
