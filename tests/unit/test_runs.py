"""A run directory is never mixed with another run, and checkpoints are whole or not there."""

import json
import subprocess
import sys

import pytest
import torch

from lora_ft import runs
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.recipe import TrainSection
from lora_ft.training import checkpoint
from lora_ft.training.checkpoint import Progress, Trained
from lora_ft.training.optim import build_optimizer
from lora_ft_adapters import add_adapter, build_config, trainable
from lora_ft_adapters.behaviour import Driver
from tests.conftest import tiny_llama

IDENTITY = {"base": "tiny", "seed": 0}


def test_a_used_directory_is_refused_and_overwrite_keeps_a_backup(tmp_path):
    run = runs.create(tmp_path / "run")
    run.update({"status": "completed"})
    run.adapter.mkdir()
    assert runs.Run(str(tmp_path / "run")) == run
    with pytest.raises(UsageError, match="in use: a run with status 'completed'"):
        runs.create(tmp_path / "run")
    runs.create(tmp_path / "run", overwrite=True)
    (backup,) = tmp_path.glob("run.bak-*")
    assert json.loads((backup / "run.json").read_text())["status"] == "completed"


def test_a_file_in_the_way_and_names_with_spaces_and_unicode(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        runs.create(tmp_path / "file")
    assert runs.create(tmp_path / "mein lauf \u00e4\U0001f600").path.is_dir()


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    run = runs.create(tmp_path / "run")
    code = (
        f"from lora_ft import runs; from pathlib import Path\nwith runs.locked(runs.Run(Path({str(run.path)!r}))): pass"
    )
    with runs.locked(run):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert "another process is using this run directory: pid" in other.stderr
    with runs.locked(run):  # free again
        pass


def test_a_directory_without_run_json_is_no_run(tmp_path):
    with pytest.raises(ArtifactError, match="not a run directory"):
        _ = runs.Run(tmp_path).facts


def fresh() -> Trained:
    torch.manual_seed(0)
    model = add_adapter(tiny_llama(50), build_config("lora", {"r": 2}, "CAUSAL_LM"))
    named = list(trainable(model))
    return Trained(model, named, build_optimizer(named, TrainSection(), {}), Driver())


@pytest.fixture
def trained():
    made = fresh()
    for _ in range(2):
        made.model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
    return made


def test_a_checkpoint_gives_back_weights_optimizer_and_random_state(tmp_path, trained):
    path = checkpoint.save(tmp_path, trained, Progress(step=2, tokens=24), IDENTITY)
    draw = torch.rand(3)
    other = fresh()
    progress = checkpoint.restore(path, other, IDENTITY)
    assert (progress.step, progress.tokens) == (2, 24)
    assert torch.equal(torch.rand(3), draw)
    for (name, a), (_, b) in zip(trained.named, other.named, strict=True):
        assert torch.equal(a, b), name
        for key, value in trained.optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.optimizer.state[b][key])), (name, key)


def test_every_flipped_bit_is_found_and_the_older_checkpoint_is_used(tmp_path, trained):
    for step in (1, 2):
        checkpoint.save(tmp_path, trained, Progress(step=step), IDENTITY)
    newest = checkpoint.latest(tmp_path)
    assert newest.name == "step-00000002"
    for file in newest.iterdir():
        raw = file.read_bytes()
        file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
        assert checkpoint.check(newest), file.name
        assert checkpoint.latest(tmp_path).name == "step-00000001"
        file.write_bytes(raw)
    assert not checkpoint.check(newest)


def test_no_usable_checkpoint_names_each_fault(tmp_path, trained):
    path = checkpoint.save(tmp_path, trained, Progress(step=1), IDENTITY)
    (path / "optim.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no checkpoint") as caught:
        checkpoint.latest(tmp_path)
    assert "optim.safetensors is missing" in caught.value.why


def test_a_checkpoint_of_another_run_is_refused(tmp_path, trained):
    path = checkpoint.save(tmp_path, trained, Progress(step=1), IDENTITY)
    with pytest.raises(ArtifactError) as caught:
        checkpoint.restore(path, trained, {**IDENTITY, "seed": 1})
    assert caught.value.why == "seed: was 0, now 1"


def test_pruning_keeps_the_newest_two_and_the_best(tmp_path, trained):
    for step in range(1, 6):
        checkpoint.save(tmp_path, trained, Progress(step=step, best_step=2 if step > 1 else 0), IDENTITY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_checkpoint_holds_no_pickle_and_no_path(tmp_path, trained):
    path = checkpoint.save(tmp_path, trained, Progress(step=1), IDENTITY)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    assert str(tmp_path) not in (path / "adapter_config.json").read_text()
