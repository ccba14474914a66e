"""combine, compress, convert and extract as people type them: read back, compared, and nothing left on failure."""

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_ft
from lora_ft import errors
from lora_ft_adapters import build_config
from lora_ft_adapters.algebra import AdapterDeltas

IDS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def plain(base_folder, tmp_path_factory):
    """Folders of PEFT adapters with random weights, by method; nothing of lora-ft is in them."""
    root = tmp_path_factory.mktemp("plain")
    methods = {"dora": ("lora", {"r": 3, "use_dora": True}), "loha": ("loha", {"r": 2}),
               "prompt": ("prompt_tuning", {"num_virtual_tokens": 2})}  # fmt: skip
    for name, (method, options) in methods.items():
        targets = {} if name == "prompt" else {"target_modules": ["q_proj", "down_proj"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = AutoModelForCausalLM.from_pretrained(base_folder)
            model = get_peft_model(base, build_config(method, {**options, **targets}, "CAUSAL_LM"))
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(str(root / name))
    return root


def stock(base_folder, folder):
    """A folder as somebody else's program reads it."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(folder), adapter_name="theirs").eval()


def deltas(base_folder, folder):
    return {n: d.matrix() for n, d in AdapterDeltas(stock(base_folder, folder), "theirs").items()}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_run_and_a_foreign_dora_are_combined_and_stock_peft_reads_the_sum(cli, run, plain, base_folder, tmp_path):
    out = tmp_path / "out"
    code, said, err = cli("combine", run.path, plain / "dora", "--weights", "0.7,0.3", "--out", out, "--json")
    assert code == 0, err
    facts = json.loads(said)
    assert facts["error"] < 1e-6
    assert facts["max_difference"] < 1e-4
    assert facts["update_kept"] > 0.999
    one, two, both = (deltas(base_folder, f) for f in (run.adapter, plain / "dora", out))
    assert set(both) == set(one) | set(two)
    for name, got in both.items():
        wanted = 0.7 * one.get(name, 0) + 0.3 * two.get(name, 0)
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    wanted_files = {"probes.safetensors", "tokenizer.json", "adapter_config.json", "README.md"}
    assert wanted_files <= {p.name for p in out.iterdir()}
    written = "".join(p.read_text() for p in out.glob("*") if p.suffix in (".json", ".md"))
    assert str(base_folder) not in written
    assert str(tmp_path) not in written
    assert not list(tmp_path.glob(".out-*"))


def test_weight_one_is_the_run_itself_and_goes_in_again(cli, run, base_folder, tmp_path):
    code, said, err = cli("combine", run.path, "--out", tmp_path / "same")
    assert code == 0, err
    assert "rank up to 4" in said
    assert "read back and compared" in said
    assert torch.allclose(
        logits(stock(base_folder, tmp_path / "same")), logits(stock(base_folder, run.adapter)), atol=1e-5
    )
    code, _, err = cli("combine", tmp_path / "same", "--out", tmp_path / "again")
    assert code == 2
    assert "--base MODEL" in err
    assert cli("combine", tmp_path / "same", "--base", base_folder, "--out", tmp_path / "again")[0] == 0


@pytest.mark.parametrize("how", ["cat", "svd", "ties", "dare", "dare_ties", "magnitude"])
def test_every_way_to_combine_works_and_states_its_error(run, plain, how, tmp_path):
    made = lora_ft.combine([run.path, plain / "dora"], tmp_path / how, how=how, rank=None if how == "cat" else 5)
    assert (made.error < 1e-6) == (how == "cat")
    assert made.rank <= 5 or how == "cat"
    assert {p.name for p in tmp_path.iterdir()} == {how}


def test_a_sparse_merge_of_loras_takes_the_sum_of_ranks_and_one_of_others_asks(run, plain, tmp_path):
    assert lora_ft.combine([run.path, run.path], tmp_path / "ties", how="ties").rank <= 8
    with pytest.raises(errors.UsageError, match="no rank to go by"):
        lora_ft.combine([run.path, plain / "loha"], tmp_path / "other", how="ties")


def test_compress_by_rank_energy_and_under_a_guard(cli, run, plain, base_folder, rows_file, tmp_path):
    code, said, err = cli("compress", run.path, "--rank", "1", "--out", tmp_path / "one", "--json")
    assert code == 0, err
    facts = json.loads(said)
    wanted, got = deltas(base_folder, run.adapter), deltas(base_folder, tmp_path / "one")
    off = sum(float((wanted[n] - got[n]).square().sum()) for n in wanted)
    whole = sum(float(w.square().sum()) for w in wanted.values())
    assert facts["error"] == pytest.approx((off / whole) ** 0.5, rel=1e-4)
    assert all(m["rank"] == 1 for m in facts["modules"])
    code, said, err = cli("compress", run.path, "--tolerance", "100", "--out", tmp_path / "loose", "--json")
    loose = json.loads(said)
    assert (code, loose["rank"]) == (0, 1), err
    assert loose["loss_whole"] == pytest.approx(run.metrics["after"]["loss"], rel=1e-4)
    code, said, err = cli("compress", run.path, "--energy", "0.2", "--tolerance", "0", "--out", tmp_path / "tight")
    assert code == 0, err
    assert "held-out loss" in said
    words = ("compress", plain / "dora", "--base", base_folder, "--rank", "2", "--tolerance", "0.5")
    code, _, err = cli(*words, "--out", tmp_path / "foreign")
    assert code == 2
    assert "--data FILE" in err
    assert cli(*words, "--data", rows_file, "--out", tmp_path / "foreign")[0] == 0


def test_convert_makes_a_lora_of_another_method(cli, plain, base_folder, tmp_path):
    code, said, err = cli("convert", plain / "loha", "--base", base_folder, "--out", tmp_path / "lora")
    assert code == 0, err
    assert "relative error of the weight changes: none above float32 rounding" in said
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert torch.allclose(
        logits(stock(base_folder, tmp_path / "lora")), logits(stock(base_folder, plain / "loha")), atol=1e-5
    )


def test_extract_gives_back_a_tuned_model(cli, base_folder, tmp_path):
    tuned = AutoModelForCausalLM.from_pretrained(base_folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "tuned")
    shutil.copy(base_folder / "tokenizer.json", tmp_path / "tuned")
    with warnings.catch_warnings():
        # Embedding and head are one tensor in this model; the adapter holds a copy of each.
        warnings.filterwarnings("ignore", message=".*a tied layer is part of the adapter.*")
        code, said, err = cli("extract", base_folder, tmp_path / "tuned", "--out", tmp_path / "lora", "--json")
        assert code == 0, err
        facts = json.loads(said)
        assert facts["max_difference"] < 1e-4
        assert "replaced as a whole" in facts["notes"][0]
        assert torch.allclose(logits(stock(base_folder, tmp_path / "lora")), logits(tuned.eval()), atol=1e-4)
        assert (tmp_path / "lora" / "tokenizer.json").is_file()
        code, said, _ = cli("extract", base_folder, tmp_path / "tuned", "--rank", "2", "--out", tmp_path / "small")
        assert code == 0
        assert "rank up to 2" in said


def test_wrong_input_has_its_exit_code_says_what_to_do_and_leaves_nothing(cli, run, plain, base_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("x")
    broken = tmp_path / "broken"
    shutil.copytree(plain / "dora", broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    save_file({n: t * float("nan") for n, t in tensors.items()}, broken / "adapter_model.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    r, base = run.path, ("--base", base_folder)
    for words, wanted, text in [
        (("combine", r, r, "--weights", "1"), 2, "2 adapters, but 1 weights"),
        (("combine", r, "--weights", "a"), 2, "are no numbers"),
        (("combine", r, "--how", "tise"), 2, "did you mean 'ties'"),
        (("combine", r, "--how", "svd"), 2, "--how svd needs a rank"),
        (("combine", r, "--how", "sum", "--rank", "2"), 2, "--how svd --rank N"),
        (("combine", r, "--density", "0", "--how", "ties"), 2, "density"),
        (("combine", "empty"), 4, "neither a run nor a PEFT adapter"),
        (("combine", "broken", *base), 4, "NaN"),
        (("combine", r, "--weights", "0"), 4, "changes nothing"),
        (("convert", plain / "prompt", *base), 4, "changes no weight"),
        (("convert", r, "--base", "./nowhere"), 4, "not found"),
        (("convert", r, "--rank", "2", "--energy", "0.9"), 2, "not both"),
        (("compress", r), 2, "needs a rank or an energy"),
        (("compress", r, "--energy", "1.5"), 2, "at most 1"),
        (("compress", r, "--rank", "1", "--data", "x"), 2, "--tolerance"),
        (("extract", base_folder, "empty"), 4, "no Transformers model"),
        (("extract", base_folder, base_folder), 4, "changes nothing"),
    ]:
        code, out, err = cli(*words, "--out", tmp_path / "new")
        assert (code, out) == (wanted, ""), (words, err)
        assert text in err, words
        assert "Traceback" not in err
        assert sorted(p.name for p in tmp_path.iterdir()) == before, words
    code, _, err = cli("convert", r, "--out", tmp_path / "used")
    assert (code, (tmp_path / "used" / "mine").read_text()) == (2, "x")
    assert "in use" in err


def test_an_adapter_of_another_base_is_refused(cli, run, plain, tmp_path, tokenizer):
    from tests.conftest import tiny_llama

    tiny_llama(len(tokenizer), seed=9).save_pretrained(tmp_path / "other")
    code, _, err = cli("convert", run.path, "--base", tmp_path / "other", "--out", tmp_path / "new")
    assert code == 4
    assert "not the one this adapter was trained on" in err


def test_what_reads_back_differently_is_not_published(run, tmp_path, monkeypatch):
    from lora_ft_adapters.algebra import LoraResult

    honest = LoraResult.tensors

    def damaged(self):
        found = honest(self)
        first = next(n for n in found if n.endswith("lora_A.weight"))
        return {**found, first: found[first] * 1.01}

    monkeypatch.setattr(LoraResult, "tensors", damaged)
    with pytest.raises(errors.ArtifactError, match="read back differs: its weights by"):
        lora_ft.convert(run.path, tmp_path / "new")
    assert not list(tmp_path.iterdir())
