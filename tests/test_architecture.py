"""The limits of the house, checked on every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for d in ("lora_ft", "adapters", "tests", "benchmarks", "scripts") for p in (ROOT / d).rglob("*.py"))
PACKAGE = [p for p in FILES if p.relative_to(ROOT).parts[0] in ("lora_ft", "adapters")]


def relative(path):
    return str(path.relative_to(ROOT))


def test_the_adapters_folder_is_no_package_that_could_shadow_another():
    assert not (ROOT / "adapters" / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_file_is_longer_than_300_lines_and_no_function_than_50(path):
    text = path.read_text()
    limit = 300 if path in PACKAGE else 400
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and path in PACKAGE:
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 50, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_no_pickle_no_remote_code_and_no_utils(path):
    text = path.read_text()
    assert path.stem != "utils"
    for word in ("import pickle", "torch.load(", "torch.save(", "trust_remote_code=True", "shell=True"):
        assert word not in text


def test_importing_the_packages_does_not_import_torch():
    code = "import sys, lora_ft, lora_ft_adapters, lora_ft.recipe, lora_ft.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_names_exist():
    import lora_ft
    import lora_ft_adapters

    for module in (lora_ft, lora_ft_adapters):
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError):
            _ = module.no_such_name


def test_the_demo_data_is_what_its_generator_writes(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "scripts"))
    import make_demo_data

    sys.path.pop(0)
    monkeypatch.setattr(make_demo_data, "FOLDER", tmp_path)
    make_demo_data.main()
    rows = {}
    for name, count in make_demo_data.ROWS.items():
        text = (tmp_path / f"{name}.jsonl").read_text()
        assert text == (ROOT / "lora_ft" / "data" / "builtin" / f"{name}.jsonl").read_text()
        rows[name] = text
        assert text.count("\n") == count
    # Held-out rows use values that no training row has.
    import json

    seen = [json.loads(json.loads(line)["completion"]) for line in rows["support-train"].splitlines()]
    held = [json.loads(json.loads(line)["completion"]) for line in rows["support-heldout"].splitlines()]
    for key in ("product", "order"):
        assert not ({r[key] for r in seen} & {r[key] for r in held}) - {None}


def test_the_readme_names_only_verbs_options_and_keys_that_exist():
    import re

    from lora_ft.cli.main import app
    from lora_ft.recipe import load_recipe
    from lora_ft.recipe.yaml import parse_yaml

    text = (ROOT / "README.md").read_text()
    verbs = {c.name for c in app.registered_commands}
    named = re.findall(r"lora-ft ([a-z]+)\b(?! is| reach)", text)
    assert set(named) <= verbs, set(named) - verbs
    assert verbs <= set(named)
    source = "".join(p.read_text() for p in (ROOT / "lora_ft" / "cli").glob("*.py"))
    for option in set(re.findall(r"(?<![-\w])--([a-z][a-z-]+)", text)) - {"strict"}:
        named = option.replace("-", "_")
        assert f'--{option}"' in source or re.search(rf"\b{named}: (Annotated|\w+Option)", source), option
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(block, "README.md", "exec")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.S)
    whole = [parse_yaml(b, "README.md")[0] for b in blocks]
    assert load_recipe([whole[0], *whole[1:]]).recipe.train.learning_rate == 2e-4
    for setting in re.findall(r"--set ([\w.]+=[\w.-]+)", text):
        load_recipe([whole[0]], sets=[setting])
