"""Peak memory of this process."""

import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """Most device memory allocated on a GPU; elsewhere the most memory the process has held."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
