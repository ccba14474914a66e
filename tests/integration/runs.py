"""What the tests read from a run."""

import json

from safetensors.torch import load_file


def records(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")
