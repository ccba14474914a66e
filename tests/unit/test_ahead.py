"""Threads that read ahead give the same results in the same order, and never hide an error."""

import threading
import time

import pytest

from lora_ft.ahead import Ahead, auto_workers
from lora_ft.cache import cached
from lora_ft.errors import ResourceError


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_items_however_long_each_takes(workers):
    def slow_first(n):
        time.sleep(0.02 if n == 0 else 0)
        return n * n

    with Ahead(slow_first, range(20), workers) as results:
        assert list(results) == [n * n for n in range(20)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_where_its_result_was_due(workers):
    def fail_at_three(n):
        if n == 3:
            raise ValueError("row 3")
        return n

    with Ahead(fail_at_three, range(10), workers) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="row 3"):
            next(results)


def test_no_more_is_read_ahead_than_the_depth():
    begun = []
    results = Ahead(begun.append, iter(range(1000)), 2)
    next(results)
    time.sleep(0.05)
    results.close()
    assert len(begun) <= results.depth


def test_work_is_done_in_other_threads_while_the_asker_is_busy():
    names = set()
    with Ahead(lambda n: names.add(threading.current_thread().name), range(6), 2) as results:
        next(results)
        time.sleep(0.1)
        started = time.perf_counter()
        for _ in range(4):
            next(results)
    assert time.perf_counter() - started < 0.1
    assert all(n.startswith("lora-ft-data") for n in names)


def test_waiting_is_measured():
    with Ahead(lambda n: time.sleep(0.03), range(3), 0) as results:
        list(results)
    assert results.waited >= 0.09


def test_closing_early_leaves_no_thread_behind():
    before = threading.active_count()
    results = Ahead(lambda n: time.sleep(0.01), range(1000), 4)
    next(results)
    results.close()
    assert threading.active_count() == before


def test_auto_leaves_a_core_for_the_model(monkeypatch):
    for cores, wanted in ((1, 1), (2, 1), (4, 3), (64, 8)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert auto_workers() == wanted


def test_a_cache_folder_is_filled_once_and_never_half(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path))
    calls = []

    def fill(folder):
        calls.append(folder)
        (folder / "x").write_text("1")
        return len(calls) > 1

    assert not cached("area", "key", fill).exists()  # it could not be made
    assert (cached("area", "key", fill) / "x").read_text() == "1"
    cached("area", "key", fill)
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match="LORA_FT_CACHE"):
        cached("area", "key", lambda folder: True)
