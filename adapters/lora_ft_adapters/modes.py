"""Training mode in which the statistics of a frozen base stay frozen."""

from torch import nn


def training_mode(model: nn.Module) -> None:
    """`model.train()`, but layers with running statistics (batch norm and its like) stay in evaluation mode.

    So a base's running mean and variance never change, whatever trains, and a row's loss does not hang on the rows
    beside it: micro-batches of any size give the same step. Gains and biases of such layers may still train (`full`,
    `layers`, `bitfit`), on the base's statistics. Those of a new head stay where they start.
    """
    model.train()
    for module in model.modules():
        if _has_statistics(module):
            module.eval()


def _has_statistics(module: nn.Module) -> bool:
    # Its own: an adapter around such a layer forwards the names, and keeps its dropout.
    return module._buffers.get("running_mean") is not None and module._buffers.get("running_var") is not None
