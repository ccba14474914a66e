"""What every task must do, alone and through the whole pipeline, on tiny models."""

import json
import math
from contextlib import closing

import pytest
import torch

import lora_ft
from lora_ft.errors import DataError
from lora_ft.pipeline.prepare import prepare
from lora_ft.pipeline.ready import make_ready
from lora_ft.recipe import load_recipe
from lora_ft.records import Silent
from lora_ft.registry import TASKS
from lora_ft.training.batching import Order, by_length
from lora_ft.training.feed import Feed
from lora_ft.training.gradients import step_gradients
from lora_ft_adapters import trainable
from tests import cases, task_cases

CASES = task_cases.CASES | cases.CASES
CPU = torch.device("cpu")


def test_every_task_has_a_case():
    assert set(TASKS.discover()) == set(CASES)


@pytest.fixture(params=sorted(CASES))
def task_recipe(request, tmp_path, base_folder):
    """A recipe of a task, its rows in files."""
    case = CASES[request.param]
    case.files(tmp_path)
    for name, numbers in (("train", range(24)), ("held", range(24, 36))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(case.row(i)) + "\n" for i in numbers))
    return {
        "model": str(base_folder) if case.model == "llama" else case.model,
        "task": {"type": request.param, **case.options},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held.jsonl"), "max_length": 64},
        "method": {"type": "lora", **case.methods["lora"]},
        "train": {"steps": 4, "batch_size": 8, "learning_rate": 5e-3, "dtype": "float32", "dropout": 0.0},
        "eval": {"generate": 4, "max_new_tokens": 4},
    }


def ready(recipe, **train):
    recipe = load_recipe([recipe, {"train": train}], [], []).recipe
    prepared = prepare(recipe, Silent())
    return prepared, make_ready(recipe, prepared, torch.float32, CPU)


def test_the_loss_is_the_models_own(task_recipe):
    prepared, made = ready(task_recipe)
    if not CASES[prepared.task.name].own_loss:
        pytest.skip("no Transformers model computes this loss")
    alike = [s for s in prepared.train if s.length == prepared.train[0].length]  # Transformers' QA loss sees padding
    batch = prepared.task.collate(alike, prepared.processor)
    made.model.eval()
    with torch.no_grad():
        own = float(made.model(**batch).loss)
        plain = prepared.task.loss(made.model, batch)
        fast = made.path.loss(made.model, batch)
    assert float(plain.total) / plain.count == pytest.approx(own, rel=1e-5)
    assert float(fast.total) / fast.count == pytest.approx(own, rel=1e-4)


def test_one_micro_batch_of_eight_equals_eight_of_one(task_recipe):
    prepared, made = ready(task_recipe)
    named = list(trainable(made.model))
    torch.manual_seed(0)
    for _, p in named:  # LoRA's B starts at zero, where the gradient of A is zero whatever the batch
        p.data += 0.02 * torch.randn_like(p)
    found = []
    for budget in (10**6, 1):
        job = _job(prepared, made, budget)
        made.model.zero_grad()
        with closing(Feed(job, Order(8, 8, 0), 0)) as feed:
            loss, _ = step_gradients(job, [p for _, p in named], feed.next(), lambda v: v.backward())
        found.append((loss, torch.cat([p.grad.flatten().clone() for _, p in named])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=2e-6 + 1e-4 * float(found[0][1].abs().max()))


def _job(prepared, made, budget):
    from lora_ft.recipe import TrainSection
    from lora_ft.training.job import Job

    task = prepared.task
    return Job(
        model=made.model, samples=prepared.train[:8], mix=task.mix,
        collate=lambda samples, draw: task.collate(samples, prepared.processor, draw), loss=made.path.loss,
        evaluate=None, settings=TrainSection(max_grad_norm=None), steps=1, eval_every=None, save_every=1,
        tokens_per_micro_batch=budget, seed=0, checkpoints=None, identity={}, log=print, listener=Silent(),
        represent=made.path.represent if task.whole_step else None, combine=task.combine if task.whole_step else None,
    )  # fmt: skip


def test_collating_gives_back_what_was_encoded(task_recipe):
    prepared, _ = ready(task_recipe)
    samples = prepared.train[:5]
    together = prepared.task.collate(samples, prepared.processor)
    alone = [prepared.task.collate([s], prepared.processor) for s in samples]
    if "input_ids" in together and together["input_ids"].dim() == 2 and len(together["input_ids"]) == 5:
        for row, one in zip(together["input_ids"], alone, strict=True):
            ids = one["input_ids"][0]
            assert torch.equal(row[: len(ids)], ids)
    for key, value in _tensors("", together):
        assert value.isfinite().all(), key
    assert prepared.task.show(samples[0], prepared.processor).strip()


def _tensors(name, value):
    """Each tensor of a batch; detectors take a list of mappings as labels."""
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        yield from _tensors(f"{name}.{key}", part)


def test_a_run_reports_saves_and_loads_its_score(task_recipe, tmp_path):
    case = CASES[task_recipe["task"]["type"]]
    run = lora_ft.train(task_recipe, out=tmp_path / "run")
    for side in ("before", "after"):
        assert case.metrics <= set(run.metrics[side]), side
        assert all(math.isfinite(v) for v in run.metrics[side].values())
    assert run.metrics["after"]["loss"] != run.metrics["before"]["loss"]
    judged = lora_ft.evaluate_run(run)[0]
    for side in ("before", "after"):
        for name in case.metrics:
            assert judged[side][name] == pytest.approx(run.metrics[side][name], rel=1e-3, abs=1e-5), (side, name)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("method", ["houlsby", "head", "full"])
def test_other_families_train_too(task_recipe, tmp_path, method):
    case = CASES[task_recipe["task"]["type"]]
    if method not in case.methods:
        pytest.skip(f"this task's model has no part for {method}")
    task_recipe["method"] = {"type": method, **case.methods[method]}
    task_recipe["train"] |= {"steps": 12, "learning_rate": 1e-3}
    task_recipe["data"]["eval"] = task_recipe["data"]["train"]  # it must learn; that it generalises is not asked
    run = lora_ft.train(task_recipe, out=tmp_path / "run")
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
    judged = lora_ft.evaluate_run(run)[0]
    assert judged["after"]["loss"] == pytest.approx(run.metrics["after"]["loss"], rel=1e-4)


def test_predict_answers_rows_without_answers(task_recipe, tmp_path):
    case = CASES[task_recipe["task"]["type"]]
    task_recipe["train"]["steps"] = 1
    run = lora_ft.train(task_recipe, out=tmp_path / "run")
    rows = [case.unlabelled(case.row(i)) for i in range(5)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert lora_ft.predict(run, str(tmp_path / "ask.jsonl"), tmp_path / "out.jsonl", max_new_tokens=4) == 5
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [f["where"].rsplit(":", 1)[-1] for f in found] == ["1", "2", "3", "4", "5"]
    assert all(isinstance(f["output"], str) and f["reference"] is None for f in found)
    assert all(f["output"] or len(f) > 4 for f in found) or task_recipe["task"]["type"] in ("causal-lm", "seq2seq-lm")


def test_a_bad_row_is_named_with_its_line(task_recipe, tmp_path):
    case = CASES[task_recipe["task"]["type"]]
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[6] = json.dumps(case.bad)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        lora_ft.train(task_recipe, out=tmp_path / "run")
    assert f"{path}:7" in str(caught.value)


def test_a_merged_model_gives_the_adapters_answers(task_recipe, tmp_path):
    run = lora_ft.train(task_recipe, out=tmp_path / "run")
    figures = lora_ft.merge(run, tmp_path / "merged", dtype="float32")
    assert figures["max_difference"] < 1e-4
    assert figures["update_kept"] > 0.99
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_judging_does_not_depend_on_the_micro_batches(task_recipe, tmp_path):
    prepared, made = ready(task_recipe)
    from lora_ft.pipeline.judge import Judge

    judge = Judge(prepared.task, made.model, prepared.processor, made.path.loss, Silent())
    large, small = (judge.held_out(prepared.held_out, budget, "")().metrics for budget in (10**6, 1))
    assert large == pytest.approx(small, rel=1e-4)
    assert len(by_length([s.length for s in prepared.held_out], 1)) == len(prepared.held_out)
