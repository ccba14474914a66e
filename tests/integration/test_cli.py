"""What people type and what they see: exit codes, one JSON object on stdout, errors that say what to do."""

import json
import os
import resource
import subprocess
import sys

import pytest

import lora_ft


@pytest.fixture
def recipe_file(base_folder, rows_file, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model: {base_folder}\ndata:\n  train: {rows_file}\n  max_length: 128\nmethod:\n  type: lora\n  r: 2\n"
        "train:\n  steps: 2\n  learning_rate: 1e-3\neval:\n  generate: 2\n  max_new_tokens: 4\n"
    )
    return path


def test_help_is_fast_and_does_not_import_torch():
    code = (
        "import sys; from lora_ft.cli.main import app; app(['--help'], standalone_mode=False);"
        "print('torch' in sys.modules)"
    )
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stdout.splitlines()[-1] == "False"
    # Processor time, because other tests share the two cores; on an idle machine it is the wall time, 0.2 s.
    assert sorted(times)[1] < 0.4


def test_train_prints_exactly_one_json_object(cli, recipe_file, tmp_path):
    code, out, err = cli("train", recipe_file, "--out", tmp_path / "run", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert set(result) == {
        "run", "status", "metrics", "trainable_parameters", "total_parameters", "tokens", "tokens_per_s",
        "peak_memory_bytes", "wall_s", "data_wait_share",
    }  # fmt: skip
    assert result["status"] == "completed"
    assert set(result["metrics"]) == {"before", "after"}
    assert "with adapter" in err
    assert "lora-ft chat" in err


def test_all_verbs_on_one_run(cli, recipe_file, rows_file, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert cli("train", recipe_file, "--out", run)[0] == 0
    code, out, _ = cli("eval", run, "--json")
    assert code == 0
    assert {"metrics", "gained", "lost", "interval_95"} <= set(json.loads(out))
    code, out, _ = cli("eval", run)
    assert "95% interval" in out
    code, out, _ = cli("predict", run, "--input", rows_file, "--output", tmp_path / "p.jsonl", "--max-new-tokens", "3")
    assert (code, len((tmp_path / "p.jsonl").read_text().splitlines())) == (0, 48)
    for words in (("merge", run), ("export", run, "--format", "peft"), ("export", run, "--format", "merged")):
        target = tmp_path / "-".join(w for w in map(str, words[2:]) or "m") if words[2:] else tmp_path / "m"
        code, out, err = cli(*words, "--out", target)
        assert code == 0, err
        assert "read back and compared" in out
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/new\nagain\n/quit\n"))
    code, out, err = cli("chat", run, "--max-new-tokens", "3", "--temperature", "0.5")
    assert code == 0, err
    assert len(out.splitlines()) >= 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert cli("chat", run, "--base", "--max-new-tokens", "3")[0] == 0


def test_a_finished_run_is_not_overwritten_but_can_be_moved_aside(cli, recipe_file, tmp_path):
    run = tmp_path / "run"
    assert cli("train", recipe_file, "--out", run)[0] == 0
    code, _, err = cli("train", recipe_file, "--out", run)
    assert code == 2
    assert "in use: a run with status 'completed'" in err
    assert cli("train", recipe_file, "--out", run, "--overwrite")[0] == 0
    assert len(list(tmp_path.glob("run.bak-*"))) == 1
    code, _, err = cli("train", "--resume", "--out", run)  # finished: nothing is left to do, and it says the same
    assert code == 0, err
    assert "resumed from step-00000002" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "missing.yaml"], 2, "cannot be read"),
        (["train"], 2, "lora-ft train --preset demo"),
        (["train", "R", "--set", "train.learning_rat=1"], 2, "'learning_rate'"),
        (["train", "R", "--set", "data.train=none.jsonl"], 3, "not found"),
        (["train", "R", "--set", "data.train=empty.jsonl"], 3, "no rows"),
        (["train", "R", "--set", "data.train=bad.jsonl"], 3, "bad.jsonl:2"),
        (["train", "R", "--set", "data.train=cols.jsonl"], 3, "no known format has the columns a, b"),
        (["train", "R", "--set", "data.train=masked.jsonl", "--set", "data.eval=null"], 3, "no trainable token"),
        (["train", "R", "--set", "method.target_modules=[q_pro]"], 2, "nearest: q_proj x2"),
        (["train", "R", "--set", "model=./nowhere"], 4, "not found"),
        (["train", "R", "--set", "model=no/such-model"], 4, "cannot be loaded"),
        (["train", "R", "--out", "used"], 2, "in use"),
        (["train", "--resume"], 2, "--resume needs the run folder"),
        (["train", "--resume", "--out", "nowhere"], 4, "no run to resume"),
        (["eval", "used"], 4, "not a run directory"),
        (["merge", "used", "--out", "x"], 4, "not a run directory"),
        (["export", "used", "--format", "gguff", "--out", "x"], 2, "unknown export 'gguff'"),
        (["list", "nothing"], 2, "methods"),
        (["frobnicate"], 2, "No such command"),
    ],
    ids=lambda v: " ".join(map(str, v))[:40] if isinstance(v, list) else None,
)
def test_wrong_input_says_what_to_do_and_has_its_exit_code(cli, recipe_file, tmp_path, words, code, said):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{oops\n')
    (tmp_path / "cols.jsonl").write_text('{"a": 1, "b": 2}\n')
    (tmp_path / "masked.jsonl").write_text('{"messages": [{"role": "user", "content": "only a question"}]}\n' * 3)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("mine")
    got, out, err = cli(*(recipe_file if w == "R" else w for w in words))
    assert got == code, err
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 14
    assert out == ""
    assert (tmp_path / "used" / "x").read_text() == "mine"


def test_a_failure_with_json_is_one_json_object_too(cli, recipe_file):
    code, out, err = cli("train", recipe_file, "--json", "--set", "data.train=none.jsonl")
    assert code == 3
    assert json.loads(out)["status"] == "failed"
    assert "error[E-DATA]" in err


def test_a_bug_is_short_on_the_screen_and_whole_in_a_file(cli, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ft.pipeline.train_run.prepare", lambda *a: 1 / 0)
    code, _, err = cli("train", recipe_file, "--out", tmp_path / "run")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err
    (crash,) = tmp_path.glob("lora-ft-crash-*.txt")
    assert "Traceback" in crash.read_text()


def test_dry_run_shows_the_mask_and_leaves_nothing_behind(cli, recipe_file, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, out, err = cli("train", recipe_file, "--dry-run")
    assert code == 0, err
    assert "what is learnt in [[ ]]" in out
    assert cli("train", recipe_file, "--dry-run", "--set", "method.r=-1")[0] == 2
    assert cli("train", recipe_file, "--dry-run", "--set", "quant=nf5")[0] == 2
    assert "[[{" in out
    assert sorted(tmp_path.iterdir()) == before


def test_init_writes_a_recipe_that_train_accepts(cli, base_folder, rows_file, tmp_path):
    code, out, _ = cli("init", "new.yaml", "--model", base_folder, "--data", rows_file)
    assert code == 0
    assert "lora-ft train new.yaml" in out
    assert "# Peak rate" in (tmp_path / "new.yaml").read_text()
    assert cli("train", "new.yaml", "--dry-run")[0] == 0
    assert cli("init", "new.yaml")[0] == 2
    assert cli("init", "all.yaml", "--full", "--model", base_folder, "--data", rows_file)[0] == 0
    assert cli("train", "all.yaml", "--dry-run")[0] == 0


@pytest.mark.parametrize("axis", ["methods", "tasks", "formats", "presets", "quantizers", "exports", "models"])
def test_every_axis_can_be_listed(cli, axis):
    code, out, _ = cli("list", axis, "--json")
    assert code == 0
    rows = json.loads(out)
    assert rows
    assert all(r["name"] and r["description"] for r in rows)
    assert cli("list", axis)[0] == 0


def test_schema_and_version(cli):
    assert json.loads(cli("schema")[1])["properties"]["model"]["description"]
    assert cli("--version")[1] == f"lora-ft {lora_ft.__version__}\n"


def test_no_home_no_terminal_and_a_closed_pipe_do_not_crash(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "TERM")} | {"TERM": "dumb"}
    command = [sys.executable, "-c", "from lora_ft.cli import main; main()", "schema"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    piped = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -c 'from lora_ft.cli import main; main()' schema | head -1"],
        env=env, capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert piped.stdout.strip() == "{"
    assert "Traceback" not in piped.stderr
