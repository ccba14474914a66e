"""Memory that quantising frees does not stay with the process as holes between what is kept."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
# 1 MB of numbers for a moment, 20 KB for good: 200 times, in a process whose heap nobody used before.
PROGRAM = """
import sys
from contextlib import nullcontext
import torch
from lora_ft.models.heap import freed_at_once

def used():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) // 1024

def left(switch):
    start, kept, held = used(), [], []
    with switch:
        torch.ones(2**20)
        for _ in range(200):
            held.append(torch.ones(2**18))
            kept.append(torch.ones(5000))
            if len(held) > 50:
                held.clear()
        held.clear()
        return used() - start

print(left(freed_at_once()), left(nullcontext()))
"""


def test_freed_memory_is_given_back_while_small_results_stay():
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    megabytes, without = map(int, done.stdout.split())
    assert megabytes <= 15
    assert without >= 40
