"""The cache of decoded media stays under its budget, survives damage and never gives a half-written array."""

import os
import threading
import time

import numpy as np
import pytest

from lora_ft.media import Cache, cache

SIZE = 2128  # bytes of a file with 250 numbers of 8 bytes


def numbers(value):
    return np.full(250, value, dtype=np.float64)


def key(n):
    return f"{n}" * 32


def names(folder):
    return {p.stem for p in folder.glob("*/*.npy")}


def test_what_was_put_comes_back_bit_for_bit_in_another_process_too(tmp_path):
    kept = Cache(tmp_path, 2**20)
    for n, array in enumerate((np.arange(12, dtype=np.uint8).reshape(2, 3, 2), np.float32([0.1]), np.zeros((3, 0)))):
        kept.put(key(n), array)
        for reader in (kept, Cache(tmp_path, 2**20)):
            found = reader.get(key(n))
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.tobytes() == array.tobytes()
    assert kept.get(key(9)) is None


def test_what_was_used_longest_ago_goes_first_when_the_cache_is_opened(tmp_path):
    kept = Cache(tmp_path, 2**20)
    for n in range(6):
        kept.put(key(n), numbers(n))
        os.utime(tmp_path / f"{n}{n}" / f"{key(n)}.npy", (1000 + n, 1000 + n))
    assert kept.get(key(0))[0] == 0  # used now, so the youngest
    Cache(tmp_path, 3 * SIZE)
    assert names(tmp_path) == {key(0), key(4), key(5)}


def test_writing_on_never_passes_the_budget_and_keeps_the_youngest(tmp_path):
    kept = Cache(tmp_path, 5 * SIZE)
    for n in range(50):
        kept.put(f"{n:032x}", numbers(n))
        os.utime(tmp_path / "00" / f"{n:032x}.npy", (1000 + n, 1000 + n))
        assert sum(p.stat().st_size for p in tmp_path.glob("*/*.npy")) <= 5 * SIZE
    assert kept.get(f"{49:032x}")[0] == 49
    assert len(names(tmp_path)) >= 3


def test_an_array_over_the_budget_drives_out_nothing(tmp_path):
    kept = Cache(tmp_path, 5 * SIZE)
    kept.put(key(1), numbers(1))
    kept.put(key(2), np.zeros(10_000))
    assert names(tmp_path) == {key(1)}


@pytest.mark.parametrize(
    "damage",
    [b"", b"broken", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', (((", None],
    ids=["empty", "text", "header", "cut"],
)
def test_a_damaged_file_is_dropped_and_made_again(tmp_path, damage):
    kept = Cache(tmp_path, 2**20)
    kept.put(key(7), numbers(7))
    (path,) = tmp_path.glob("*/*.npy")
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    assert kept.get(key(7)) is None
    assert not path.exists()
    assert kept.through(key(7), lambda: numbers(8))[0] == 8
    assert kept.through(key(7), lambda: pytest.fail("it is in the cache"))[0] == 8


def test_pickled_objects_are_never_loaded(tmp_path):
    kept = Cache(tmp_path, 2**20)
    path = tmp_path / "ab" / f"{'ab' * 16}.npy"
    path.parent.mkdir()
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert kept.get("ab" * 16) is None


def test_a_budget_of_zero_keeps_nothing(tmp_path):
    off = Cache(tmp_path / "off", 0)
    off.put(key(1), numbers(1))
    assert off.get(key(1)) is None
    assert off.through(key(1), lambda: numbers(3))[0] == 3
    assert not (tmp_path / "off").exists()


def test_a_folder_that_cannot_be_written_only_means_that_nothing_is_kept(tmp_path):
    (tmp_path / "file").write_text("x")
    kept = Cache(tmp_path / "file", 2**20)
    kept.put(key(1), numbers(1))
    assert kept.get(key(1)) is None


def test_who_reads_an_array_while_it_is_written_anew_or_fails_to_be_gets_the_old_one_whole(tmp_path, monkeypatch):
    kept = Cache(tmp_path, 2**20)
    kept.put(key(1), numbers(1))
    with next(tmp_path.glob("*/*.npy")).open("rb") as reader:
        kept.put(key(1), numbers(2))
        assert np.load(reader)[0] == 1
    assert kept.get(key(1))[0] == 2

    def full(file, *_, **__):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    kept.put(key(1), numbers(3))
    assert kept.get(key(1))[0] == 2
    assert [p.name for p in tmp_path.glob("*/*")] == [f"{key(1)}.npy"]


def test_staged_files_of_a_killed_process_are_removed_and_those_at_work_stay(tmp_path):
    (tmp_path / "aa").mkdir()
    for name, age in ((".tmp-old", 7200), (".tmp-new", 0)):
        (tmp_path / "aa" / name).write_bytes(b"x")
        os.utime(tmp_path / "aa" / name, (time.time() - age,) * 2)
    Cache(tmp_path, 2**20)
    assert [p.name for p in (tmp_path / "aa").iterdir()] == [".tmp-new"]


def test_threads_that_write_read_and_prune_at_once_see_whole_arrays_only(tmp_path):
    wrong, caches = [], [Cache(tmp_path, 6 * SIZE), Cache(tmp_path, 6 * SIZE)]

    def work(kept, first):
        for n in range(60):
            value = (first + n) % 12
            found = kept.through(f"{value:032x}", lambda value=value: numbers(value))
            if found.tobytes() != numbers(value).tobytes():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(caches[i % 2], 3 * i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not list(tmp_path.glob("*/.tmp-*"))


def test_the_cache_of_the_process_is_off_until_it_has_a_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_open", {})
    cache.shared().put(key(1), numbers(1))
    assert not (tmp_path / "media").exists()
    cache.use(2**20)
    cache.shared().put(key(1), numbers(1))
    assert names(tmp_path / "media") == {key(1)}
