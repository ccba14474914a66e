"""The results of a function over items, computed by threads a few items ahead of whoever asks, in order."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

MOST = 8  # reading and resizing scale to a few threads; beyond that Python's own lock is in the way


def auto_workers() -> int:
    """Threads that read ahead when nobody says how many: all cores but one, at most 8, at least 1."""
    return max(1, min(MOST, (os.cpu_count() or 1) - 1))


class Ahead(Generic[In, Out]):
    """An iterator of `function(item)` over `items`, in their order; an error is raised where its result was due.

    Args:
        function: must not depend on the order of its calls.
        items: taken one by one, at most `2 * workers + 1` ahead.
        workers: threads; 0 computes each result when it is asked for.

    Attributes:
        waited: seconds that `next` took so far.
    """

    def __init__(self, function: Callable[[In], Out], items: Iterable[In], workers: int) -> None:
        self.function, self.items = function, iter(items)
        self.waited = 0.0
        self.depth = 2 * workers + 1
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="lora-ft-data") if workers else None
        self.futures: deque[Future[Out]] = deque()

    def __iter__(self) -> Iterator[Out]:
        """Itself."""
        return self

    def __next__(self) -> Out:
        """The next result."""
        started = time.perf_counter()
        try:
            if self.pool is None:
                return self.function(next(self.items))
            for item in islice(self.items, self.depth - len(self.futures)):
                self.futures.append(self.pool.submit(self.function, item))
            if not self.futures:
                raise StopIteration
            return self.futures.popleft().result()
        finally:
            self.waited += time.perf_counter() - started

    def close(self) -> None:
        """Give the threads back; results that nobody asked for are dropped."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.futures.clear()

    def __enter__(self) -> "Ahead[In, Out]":
        """For `with`, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
