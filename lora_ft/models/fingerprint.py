"""Which weights an adapter was trained on: a hash that is the same in float32 and bfloat16."""

import hashlib
from collections.abc import Collection

import torch
from torch import nn

VALUES = 64  # sampled from each parameter


def fingerprint(model: nn.Module, fresh: Collection[str] = ()) -> str:
    """SHA-256 over names, shapes and evenly spaced values, rounded to bfloat16, of the frozen parameters.

    Quantised weights are hashed as they are stored, so one base has one fingerprint per quantiser.

    Args:
        model: the plain base.
        fresh: names of modules that are not in its files and start at random; they are left out.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if any(name.startswith(f"{module}.") for module in fresh):
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        count = min(VALUES, flat.numel())
        index = (torch.arange(count) * (flat.numel() - 1) // max(1, count - 1)).to(flat.device)
        values = flat[index].cpu()
        digest.update(values.float().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
