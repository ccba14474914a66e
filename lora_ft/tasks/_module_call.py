"""Run a user's module on a batch of arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.errors import UsageError

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# What a module raises for inputs that it cannot take; running out of memory is none of these to the user.
CALL_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)


def call(model: nn.Module, positional: Sequence[Tensor], named: Mapping[str, Tensor], input_dtype: str) -> Tensor:
    """The module's output (B, ...): what it returns, the first part of a tuple, or `.logits`.

    Args:
        model: any module; what Transformers and PEFT wrap around it does not matter.
        positional: inputs (B, ...) in order.
        named: inputs (B, ...) by the names of its arguments.
        input_dtype: what whole numbers become: auto, float or keep.

    Raises:
        UsageError: the module does not take these inputs, or gives no tensor with a row for each.
    """
    dtype = _dtype_of(model)
    keep = input_dtype == "keep" or (input_dtype == "auto" and (bool(named) or _looks_up(model)))
    args = [_cast(x, dtype, keep) for x in positional]
    kwargs = {k: _cast(x, dtype, keep) for k, x in named.items()}
    try:
        answer = model(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except CALL_ERRORS as error:
        if hasattr(model, "peft_config"):  # the module itself runs; the caller says what the method does wrong
            raise
        raise _refused(model, args, kwargs, error) from error
    output = _tensor_of(answer)
    rows = len([*args, *kwargs.values()][0])
    if output is None or output.dim() == 0 or len(output) != rows:
        got = f"a {type(answer).__name__}" if output is None else f"a tensor of shape {tuple(output.shape)}"
        raise UsageError(
            f"the model gives {got} for {rows} rows",
            where="model",
            fix="return a tensor whose first dimension is the rows, a tuple that starts with it, or an object with it "
            "as .logits",
        )
    return output


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Of the base: frozen parameters come before trained copies, which may be in a wider one."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    return next((p.dtype for p in floating if not p.requires_grad), floating[0].dtype if floating else torch.float32)


def _looks_up(model: nn.Module) -> bool:
    return any(isinstance(m, EMBEDDINGS) for m in model.modules())


def _cast(x: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    return x if keep and not x.is_floating_point() else x.to(dtype)


def _tensor_of(answer: Any) -> Tensor | None:
    answer = answer[0] if isinstance(answer, tuple | list) and len(answer) else answer
    answer = getattr(answer, "logits", answer)
    return answer if isinstance(answer, Tensor) else None


def _refused(model: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Tensor], error: Exception) -> UsageError:
    shown = [_shown(x) for x in args] + [f"{k}={_shown(x)}" for k, x in kwargs.items()]
    whole = any(not x.is_floating_point() for x in [*args, *kwargs.values()])
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return UsageError(
        f"the model does not take a batch: {first[:300]}",
        where=f"{type(model).__name__}({', '.join(shown)})",
        fix="fit task.arguments to the data" + ("; task.input_dtype: float for whole numbers" if whole else ""),
    )


def _shown(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
