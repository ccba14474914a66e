"""A finished run that tests may read but not change."""

import pytest

import lora_ft


@pytest.fixture(scope="session")
def run(base_folder, rows_file, tmp_path_factory):
    """A finished run."""
    recipe = {
        "model": str(base_folder), "data": {"train": str(rows_file), "eval": "25%", "max_length": 128},
        "method": {"type": "lora", "r": 4}, "eval": {"generate": 4, "max_new_tokens": 8},
        "train": {"steps": 6, "batch_size": 8, "learning_rate": 5e-3, "dtype": "float32", "save_every": 3},
    }  # fmt: skip
    return lora_ft.train(recipe, out=tmp_path_factory.mktemp("runs") / "run")
