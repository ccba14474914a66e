"""Artifacts that were damaged or swapped: each fault ends with exit code 4 and nothing is left behind.

Where `seal` is mended after the fault, the list of file hashes says that all is well, so that only the answers at the
end of training can tell.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_ft
import lora_ft.exports
from lora_ft.artifact import Probe
from lora_ft.errors import ArtifactError
from lora_ft.exports import golden
from lora_ft.registry import EXPORTS
from tests.conftest import tiny_llama
from tests.integration.runs import adapter, forget_proofs
from tests.tiny import LLAMA3, tiny_tokenizer

pytestmark = pytest.mark.slow
TENSORS = "adapter_model.safetensors"


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run that a test may damage."""
    shutil.copytree(run.path, tmp_path / "run")
    return lora_ft.Run(tmp_path / "run")


@pytest.fixture(scope="module")
def labels_run(base_folder, tmp_path_factory):
    """A finished classifier, whose head is saved with the adapter."""
    folder = tmp_path_factory.mktemp("labels")
    rows = [{"text": f"the ball is {('red', 'green')[i % 2]} {i}", "label": ("no", "yes")[i % 2]} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = {
        "model": str(base_folder), "task": "text-classification", "method": {"type": "lora", "r": 2},
        "data": {"train": str(folder / "rows.jsonl"), "eval": "25%"},
        "train": {"steps": 6, "dtype": "float32", "learning_rate": 5e-3},
    }  # fmt: skip
    return lora_ft.train(recipe, out=folder / "run")


def rewrite(run, change):
    """The run's adapter with other tensors."""
    tensors = adapter(run.adapter)
    change(tensors)
    save_file(tensors, run.adapter / TENSORS)


def zeroed(run):
    rewrite(run, lambda tensors: largest(tensors).zero_())


def not_a_number(run):
    def change(tensors):
        largest(tensors).view(-1)[0] = float("nan")

    rewrite(run, change)


def a_sign_flipped(run):
    rewrite(run, lambda tensors: largest(tensors).neg_())


def largest(tensors):
    """The `lora_B` that does most."""
    return max((t for n, t in tensors.items() if "lora_B" in n), key=lambda t: float(t.norm()))


def scaling_halved(run):
    path = run.adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 2}))


def a_tensor_missing(run):
    rewrite(run, lambda tensors: tensors.pop(next(n for n in tensors if "lora_B" in n)))


def truncated(run):
    path = run.adapter / TENSORS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS = [zeroed, not_a_number, a_sign_flipped, scaling_halved, a_tensor_missing, truncated]
BY_ANSWERS = {zeroed, a_sign_flipped, scaling_halved}


def seal(run):
    """The list of hashes says that the files are those of training."""
    path = run.adapter / golden.FACTS_FILE
    facts = json.loads(path.read_text())
    facts["sha256"] = {name: golden.file_hash(run.adapter / name) for name in facts["sha256"]}
    path.write_text(json.dumps(facts))


def refused(cli, run, tmp_path):
    """What `eval`, `merge` and `export` say of the run; each must end with 4 and leave nothing."""
    before = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} | {run.path.relative_to(tmp_path) / ".lock"}
    said = []
    for words in (("eval", run.path), ("merge", run.path, "--out", "out"),
                  ("export", run.path, "--format", "peft", "--out", "out")):  # fmt: skip
        code, out, err = cli(*words)
        assert code == 4, (words, out, err)
        assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} <= before, words
        said.append(err)
    return said


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_adapter_is_refused_by_its_hashes(cli, copied, fault, tmp_path):
    fault(copied)
    name = "adapter_config.json" if fault is scaling_halved else TENSORS
    assert all(f"{name} is not the file that training wrote" in err for err in refused(cli, copied, tmp_path))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_adapter_whose_hashes_were_mended_is_refused_all_the_same(cli, copied, fault, tmp_path):
    fault(copied)
    seal(copied)
    said = refused(cli, copied, tmp_path)
    if fault in BY_ANSWERS:
        assert all("the adapter on its base answers otherwise than at the end of training" in err for err in said)


def test_the_untouched_copy_passes_all_that_refuses_the_damaged_ones(cli, copied, tmp_path):
    seal(copied)
    assert cli("eval", copied.path)[0] == 0
    assert cli("merge", copied.path, "--out", "merged")[0] == 0
    assert cli("export", copied.path, "--format", "peft", "--out", "peft")[0] == 0


def test_every_single_tensor_that_is_zeroed_is_noticed_by_the_answers(copied):
    """Not the largest alone: of each layer, what its second half adds."""
    whole = adapter(copied.adapter)
    missed = []
    for name in (n for n in whole if "lora_B" in n):
        save_file({n: torch.zeros_like(t) if n == name else t for n, t in whole.items()}, copied.adapter / TENSORS)
        seal(copied)
        try:
            lora_ft.load(copied)
        except ArtifactError:
            continue
        missed.append(name)
    assert not missed


def another_base(copied, tokenizer, folder):
    """The run's recipe names a model of the same shapes with other values; gives its fingerprint."""
    tiny_llama(len(tokenizer), seed=9).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = copied.path / "recipe.resolved.yaml"
    lines = path.read_text().splitlines()
    path.write_text("".join(f"model: {folder}\n" if x.startswith("model:") else f"{x}\n" for x in lines))


def test_another_base_of_the_same_shapes_is_refused(cli, copied, tokenizer, tmp_path):
    another_base(copied, tokenizer, tmp_path / "other")
    said = refused(cli, copied, tmp_path)
    assert all("not the one this adapter was trained on" in err for err in said)


def test_another_base_with_the_fingerprint_of_the_right_one_answers_otherwise(
    cli, copied, tokenizer, tmp_path, monkeypatch
):
    another_base(copied, tokenizer, tmp_path / "other")
    mark = copied.facts["fingerprint"]
    monkeypatch.setattr("lora_ft.pipeline.loading.fingerprint", lambda *_: mark)
    monkeypatch.setattr("lora_ft.pipeline.on_base.fingerprint_of_files", lambda *_: mark)
    said = refused(cli, copied, tmp_path)
    assert all("the base alone answers otherwise" in err for err in said)
    assert all("the base is not the one of training" in err for err in said)


def test_another_chat_template_or_special_token_is_refused(cli, copied, tmp_path):
    tiny_tokenizer(LLAMA3).save_pretrained(copied.adapter)
    assert all("chat template or special tokens" in err for err in refused(cli, copied, tmp_path))
    other = tiny_tokenizer((copied.adapter / "chat_template.jinja").read_text(), eos="</s>")
    other.save_pretrained(copied.adapter)
    assert all("chat template or special tokens" in err for err in refused(cli, copied, tmp_path))


@pytest.mark.parametrize("what", ["missing", "zeroed"])
def test_a_classifier_without_its_head_is_refused(cli, labels_run, what, tmp_path):
    shutil.copytree(labels_run.path, tmp_path / "run")
    copied = lora_ft.Run(tmp_path / "run")
    lora_ft.load(copied)

    def change(tensors):
        heads = [n for n in tensors if "lora_" not in n]
        assert heads
        for name in heads:
            tensors.pop(name) if what == "missing" else tensors[name].zero_()

    rewrite(copied, change)
    seal(copied)
    refused(cli, copied, tmp_path)


@pytest.mark.parametrize("name", [golden.GOLDEN_FILE, golden.FACTS_FILE])
def test_a_record_of_the_answers_that_is_half_there_is_refused(cli, copied, name, tmp_path):
    path = copied.adapter / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(cli, copied, tmp_path)


def test_a_run_of_before_there_were_golden_answers_still_loads(copied, tmp_path):
    forget_proofs(copied)
    assert lora_ft.load(copied).model is not None
    assert lora_ft.merge(copied, tmp_path / "merged")["max_difference"] <= 1e-4


def test_a_merged_folder_with_a_tensor_zeroed_gives_no_base_back(cli, copied, tmp_path):
    assert cli("merge", copied.path, "--out", "merged")[0] == 0
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    next(t for n, t in tensors.items() if n.endswith("down_proj.weight")).zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    before = sorted(tmp_path.rglob("*"))
    code, _, err = cli("unmerge", tmp_path / "merged", "--run", copied.path, "--out", "base")
    assert code == 4, err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["zeroed", "nan"])
def test_a_merge_that_is_written_wrongly_is_not_published(cli, run, what, tmp_path, monkeypatch):
    form = EXPORTS.get("merged")
    write = type(form).write

    def wrong(self, artifact, folder):
        write(self, artifact, folder)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        one = next(t for n, t in tensors.items() if n.endswith("down_proj.weight"))
        one.fill_(0.0 if what == "zeroed" else float("nan"))
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(type(form), "write", wrong)
    code, _, err = cli("merge", run.path, "--out", "out")
    assert code == 4, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "content", "said"),
    [
        (["probes.json"], None, "missing or unreadable"),
        (["probes.json"], "[]", "not a JSON object"),
        (["probes.json", "golden.safetensors", "probes.safetensors"], None, "is gone"),
        (["adapter_config.json"], "{}", "not the file that training wrote|no peft_type"),
        (["../recipe.resolved.yaml"], None, "recipe is gone"),
    ],
)
def test_proofs_that_are_taken_away_or_damaged_are_missed(copied, names, content, said, cli):
    for name in names:
        (copied.adapter / name).unlink()
        if content is not None:
            (copied.adapter / name).write_text(content)
    for verb in (("inspect", copied.path, "--check"), ("merge", copied.path, "--out", "out")):
        code, _, err = cli(*verb)
        assert (code, bool(re.search(said, err))) == (4, True), (verb, err)


def test_a_strong_adapter_does_not_hide_another_base(run, tmp_path, tokenizer):
    """The base may be off by half of the adapter's effect where a dtype differs, and by a fifth of a number at most."""
    probes = lora_ft.exports.answers(
        lora_ft.load(run).model, lora_ft.exports.read_probes(run.adapter), lora_ft.load(run).task.outputs
    )
    strong = [Probe(p.inputs, p.base, p.base + 50 * torch.randn_like(p.base)) for p in probes]
    for name in golden.SEALED:
        shutil.copy(run.adapter / name, tmp_path)
    golden.write_golden(tmp_path, strong, {"dtype": "float32"})
    other = [Probe(p.inputs, torch.randn_like(p.base), p.adapted) for p in strong]
    for form in (golden.Form.SAME, golden.Form.ROUNDED):
        golden.check_golden(tmp_path, strong, form)
        with pytest.raises(ArtifactError, match="the base alone answers otherwise"):
            golden.check_golden(tmp_path, other, form)


def test_a_number_that_is_not_one_passes_no_check(run):
    """Whatever the size of the adapter's effect: comparisons with NaN are false."""
    inputs = lora_ft.exports.read_probes(run.adapter)
    loaded = lora_ft.load(run)
    probes = lora_ft.exports.answers(loaded.model, inputs, loaded.task.outputs)
    assert golden.check_golden(run.adapter, probes, golden.Form.SAME)["golden_top1"] == 1.0
    for side in ("base", "adapted"):
        bad = [
            Probe(p.inputs, **({"base": p.base, "adapted": p.adapted} | {side: torch.full_like(p.base, float("nan"))}))
            for p in probes
        ]
        for form in golden.Form:
            with pytest.raises(ArtifactError, match="answers otherwise"):
                golden.check_golden(run.adapter, bad, form)


def test_an_adapter_without_effect_at_the_end_of_training_must_not_have_one_later(run, tmp_path):
    """The share of an effect of nothing is no measure: only equality is left."""
    loaded = lora_ft.load(run)
    found = lora_ft.exports.answers(loaded.model, lora_ft.exports.read_probes(run.adapter), loaded.task.outputs)
    for name in golden.SEALED:
        shutil.copy(run.adapter / name, tmp_path)
    golden.write_golden(tmp_path, [Probe(p.inputs, p.base, p.base) for p in found], {"dtype": "float32"})
    for adapted in (found[0].adapted, torch.full_like(found[0].adapted, float("nan"))):
        bad = [Probe(found[0].inputs, found[0].base, adapted), *[Probe(p.inputs, p.base, p.base) for p in found[1:]]]
        with pytest.raises(ArtifactError, match="answers otherwise"):
            golden.check_golden(tmp_path, bad, golden.Form.SAME)


@pytest.mark.parametrize("fault", [None, zeroed, a_sign_flipped, scaling_halved])
def test_the_answers_tell_in_another_dtype_than_that_of_training(copied, fault):
    if fault is None:
        assert lora_ft.load(copied, dtype="bfloat16").dtype == "bfloat16"
        return
    fault(copied)
    seal(copied)
    with pytest.raises(ArtifactError, match="the adapter on its base answers otherwise"):
        lora_ft.load(copied, dtype="bfloat16")


def test_without_the_text_of_the_probes_they_are_made_again_from_the_rows(cli, recipe, tmp_path):
    recipe["train"] |= {"probe_text": False}
    made = lora_ft.train(recipe, out=tmp_path / "run")
    assert not (made.adapter / "probes.safetensors").exists()
    assert lora_ft.load(made).model is not None
    scaling_halved(made)
    seal(made)
    said = refused(cli, made, tmp_path)
    assert all("the adapter on its base answers otherwise" in err for err in said)
