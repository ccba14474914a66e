"""What the benchmarks share: interleaved rounds, paired ratios, facts about the machine, result files."""

import json
import platform
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def facts() -> dict[str, Any]:
    """Device, versions and commit, for the result file."""
    found = {}
    for package in ("torch", "transformers", "peft", "trl", "accelerate", "lora-ft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": found,
        "commit": commit.stdout.strip() or None,
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def paired(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ratios theirs / ours of each round: how many times faster we are."""
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def write(name: str, values: dict[str, Any]) -> Path:
    """benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(values, indent=1) + "\n")
    return path
