"""The command line in this process, and a finished run that tests may read but not change."""

import sys

import pytest

import lora_ft
from lora_ft.cli.main import main


@pytest.fixture(scope="session")
def run(base_folder, rows_file, tmp_path_factory):
    """A finished run."""
    recipe = {
        "model": str(base_folder), "data": {"train": str(rows_file), "eval": "25%", "max_length": 128},
        "method": {"type": "lora", "r": 4}, "eval": {"generate": 4, "max_new_tokens": 8},
        "train": {"steps": 6, "batch_size": 8, "learning_rate": 5e-3, "dtype": "float32", "save_every": 3},
    }  # fmt: skip
    return lora_ft.train(recipe, out=tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA_FT_DEBUG", raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-ft", *map(str, words)])
        code: int | str | None = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return int(code or 0), captured.out, captured.err

    return call
