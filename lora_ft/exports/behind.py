"""Make one tensor while the one before it is written."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Made = TypeVar("Made")
LARGE = 2**26  # bytes; one as large as this is alone in memory


def write_behind(items: Iterable[tuple[int, Callable[[], Made]]], write: Callable[[Made], object]) -> None:
    """Call `write` on each item in their order, in another thread than the one that makes them.

    At most one item waits while the next is made, and none where either of the two is large.

    Args:
        items: bytes of each, and a function that makes it.
        write: takes what was made.
    """
    before, waiting = 0, Future[object]()
    waiting.set_result(None)
    with ThreadPoolExecutor(1) as thread:
        for size, make in items:
            if max(before, size) >= LARGE:
                waiting.result()
            made = make()
            waiting.result()
            before, waiting = size, thread.submit(write, made)
            del made  # the thread alone holds it
        waiting.result()
