"""Cross entropy of a frozen output head at chosen rows, with the gradient of its input ready after the forward.

Full logits never exist: rows go through in chunks, and each chunk needs two products, logits = h W^T and
dh = (softmax(logits) - onehot(y)) W. The head is frozen, so dW is never wanted.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # logits of one chunk in float32; larger chunks gain no speed on a CPU or a GPU


@dataclass(frozen=True, slots=True)
class HeadResult:
    """Sum of cross entropies (differentiable), number of rows, and how many rows the head gets right."""

    loss_sum: Tensor
    count: int
    correct: Tensor


class _LabelledHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
        """h (N, D), weight (V, D), bias (V), y (N) -> sum of cross entropies (), number right ()."""
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        correct = torch.zeros((), dtype=torch.int64, device=h.device)
        wants_gradient = ctx.needs_input_grad[0]
        grad = torch.empty_like(h) if wants_gradient else None
        for start in range(0, len(y), rows):
            part, target = h[start : start + rows], y[start : start + rows]
            logits = torch.nn.functional.linear(part, weight, bias).float()
            lse = torch.logsumexp(logits, -1)
            index = torch.arange(len(target), device=h.device)
            loss += (lse - logits[index, target]).sum()
            if grad is None:  # the count of right answers is for evaluation; training skips the extra pass
                correct += (logits.argmax(-1) == target).sum()
                continue
            logits.sub_(lse[:, None]).exp_()
            logits[index, target] -= 1
            torch.mm(logits.to(h.dtype), weight, out=grad[start : start + rows])
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None


def labelled_head(h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> HeadResult:
    """Sum of cross entropies of `h @ weight.T + bias` against `y`.

    Args:
        h: (N, D) hidden states at the labelled positions.
        weight: (V, D), frozen.
        bias: (V,) or None, frozen.
        y: (N,) token ids.
    """
    if not torch.is_grad_enabled():
        h = h.detach()
    loss, correct = _LabelledHead.apply(h, weight, bias, y)  # type: ignore[no-untyped-call]
    return HeadResult(loss, len(y), correct)
