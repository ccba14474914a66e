"""Memory that is freed while a base is quantised goes back at once, so that the peak is what is in use."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
SMALL = 128 * 1024
LARGEST = 32 * 1024 * 1024  # where glibc's own adjustment ends


@contextmanager
def freed_at_once() -> Iterator[None]:
    """While the block runs, glibc maps each large block by itself and unmaps it when it is freed.

    By default it learns from the first large block that is freed to take such blocks from its heap. Between them lie
    the small results that stay, so the heap never shrinks: quantising 400M parameters left 1.5 GB of holes behind.
    Elsewhere than with glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, LARGEST)  # what it comes to by itself in any training
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST)
        libc.malloc_trim(0)
