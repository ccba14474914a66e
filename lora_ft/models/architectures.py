"""Small models that a recipe can name, `model: python:lora_ft.models.architectures:mlp`, without code of its own."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from lora_ft.errors import UsageError, did_you_mean

__all__ = ["mlp"]

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
}  # fmt: skip
OUTPUTS: Mapping[str, Callable[[], nn.Module]] = {"sigmoid": nn.Sigmoid, "softmax": lambda: nn.Softmax(dim=-1)}


class MLP(nn.Module):
    """Linear layers with an activation after each but the last, which may have a function of its own.

    Args:
        sizes: features of the input, of each hidden layer, and of the output.
        activation: makes the function between layers.
        output: makes the function at the end.
        dropout: after each activation.
    """

    def __init__(
        self, sizes: Sequence[int], activation: Callable[[], nn.Module], output: Callable[[], nn.Module], dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activation = activation()
        self.dropout = nn.Dropout(dropout)
        self.output = output()

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., sizes[0]) -> (..., sizes[-1])."""
        *hidden, last = self.layers
        for layer in hidden:
            inputs = self.dropout(self.activation(layer(inputs)))
        result: Tensor = self.output(last(inputs))
        return result


def mlp(
    sizes: Sequence[int],
    activation: str = "relu",
    output: Literal["sigmoid", "softmax"] | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """A multi-layer perceptron.

    Args:
        sizes: features of the input, of each hidden layer, and of the output: [10, 64, 64, 1].
        activation: relu, gelu, silu, tanh, sigmoid, elu or leaky_relu.
        output: sigmoid (for binary_cross_entropy), softmax, or None for plain numbers.
        dropout: after each activation.

    Raises:
        UsageError: an argument that no such model has.
    """
    whole = isinstance(sizes, Sequence) and all(isinstance(s, int) and not isinstance(s, bool) for s in sizes)
    if not whole or len(sizes) < 2 or min(sizes) < 1:
        raise UsageError(f"mlp: sizes are two or more whole numbers from 1 on, such as [10, 64, 1], got {sizes!r}")
    if activation not in ACTIVATIONS:
        raise UsageError(f"mlp: unknown activation {activation!r}; {did_you_mean(str(activation), ACTIVATIONS)}")
    if output is not None and output not in OUTPUTS:
        raise UsageError(f"mlp: unknown output {output!r}; {did_you_mean(str(output), OUTPUTS)}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UsageError(f"mlp: dropout is from 0 up to 1, got {dropout!r}")
    return MLP(sizes, ACTIVATIONS[activation], OUTPUTS[output] if output else nn.Identity, dropout)
