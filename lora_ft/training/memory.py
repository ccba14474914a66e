"""Peak memory of this process."""

import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes() -> int:
    """Most device memory allocated on a GPU; elsewhere the most memory the process has held."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")  # ru_maxrss would start at what the parent process held
    if status.exists():
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
