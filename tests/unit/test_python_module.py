"""A recipe's own code never runs unasked, and what is wrong with it is said in one line."""

import sys

import pytest
import torch
from torch import nn

from lora_ft.errors import UnsafeError, UsageError
from lora_ft.models import python_module
from lora_ft.models.architectures import mlp

MLP = "python:lora_ft.models.architectures:mlp"
CODE = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self, width: int, deep: bool = False):
        super().__init__()
        self.layer = nn.Linear(width, 2)

    def forward(self, x):
        return self.layer(x)

def build(width: int, *, deep=False):
    return Two(width, deep)

def number():
    return 7

def empty():
    return nn.ReLU()

def lazy():
    return nn.LazyLinear(3)

def broken(width):
    raise RuntimeError("no weights\\nat all")

def real_only():
    scale = torch.ones(1).item()
    return nn.Linear(2, int(scale))

constant = 3
"""


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(CODE)
    return path


def build(path, name, trust_code=True, **arguments):
    return python_module.build(f"python:{path}:{name}", arguments, trust_code=trust_code)


@pytest.mark.parametrize(
    ("model", "so"),
    [("python:a.py:f", True), (MLP, True), ("builtin:x", False), ("org/python", False), ("./python:a", False)],
)
def test_only_the_prefix_makes_a_function(model, so):
    assert python_module.is_spec(model) is so


def test_code_that_is_not_trusted_is_not_even_read(tmp_path):
    path = tmp_path / "evil.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for spec in (f"python:{path}:f", "python:os.path:join", "python:lora_ft.models.resolve:resolve"):
        for run in (python_module.build, python_module.skeleton):
            with pytest.raises(UnsafeError, match="would run on this machine") as caught:
                run(spec, {}, trust_code=False)
            assert caught.value.exit_code == 5
            assert "--trust-code" in caught.value.fix
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pairwise", "nn", "MLP", "UsageError", "__import__"])
def test_our_own_package_is_no_way_around_the_flag(name):
    with pytest.raises(UsageError, match="no function"):
        python_module.build(f"python:lora_ft.models.architectures:{name}", {}, trust_code=False)


def test_our_own_mlp_needs_no_flag_and_is_the_seeds():
    arguments = {"sizes": [10, 64, 64, 1], "activation": "relu", "output": "sigmoid"}
    torch.manual_seed(3)
    model = python_module.build(MLP, arguments, trust_code=False)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    torch.manual_seed(3)
    plain = nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid()
    )  # fmt: skip
    x = torch.randn(5, 10)
    assert torch.equal(model(x), plain(x))
    assert [n for n, _ in model.named_parameters()] == [
        f"layers.{i}.{part}" for i in range(3) for part in ("weight", "bias")
    ]


def test_a_file_and_a_class_of_it_build_models(code):
    assert build(code, "build", width=5).layer.in_features == 5
    assert build(code, "Two", width=4).layer.in_features == 4


def test_two_files_of_one_name_and_a_changed_file_are_not_mixed_up(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        folder.mkdir()
        (folder / "m.py").write_text(f"from torch import nn\ndef f(): return nn.Linear({i + 1}, 1)\n")
    assert [build(f / "m.py", "f").in_features for f in folders] == [1, 2]
    (folders[0] / "m.py").write_text("from torch import nn\ndef f(): return nn.Linear(9, 1)\n")
    assert build(folders[0] / "m.py", "f").in_features == 9
    assert "m" not in sys.modules


def test_a_file_can_import_what_lies_beside_it(tmp_path):
    (tmp_path / "helper_of_the_test.py").write_text("WIDTH = 6\n")
    (tmp_path / "m.py").write_text(
        "from torch import nn\ndef f():\n    import helper_of_the_test as h\n    return nn.Linear(h.WIDTH, 1)\n"
    )
    before = list(sys.path)
    assert build(tmp_path / "m.py", "f").in_features == 6
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("bild", {}, "no function 'bild'.*did you mean 'build'"),
        ("constant", {}, "'constant' is no function"),
        ("build", {"widht": 3}, "takes no argument 'widht' .did you mean 'width'.* and needs 'width'"),
        ("build", {}, "needs 'width'"),
        ("number", {"a": 1}, "takes no argument 'a'\n"),
        ("number", {}, "the function gives int, not a torch.nn.Module"),
        ("empty", {}, "has no parameters"),
        ("lazy", {}, "not known before a first batch"),
        ("broken", {"width": 1}, "the function failed: RuntimeError: no weights .line 26 of .*my_model.py"),
    ],
)
def test_what_is_wrong_with_the_function_is_named(code, name, arguments, said):
    with pytest.raises(UsageError, match=said):
        build(code, name, **arguments)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("python:{folder}/my_modle.py:build", "does not exist; did you mean 'my_model.py'"),
        ("python:{folder}/none/x.py:build", "there is no .py file in"),
        ("python:no_such_package_here.models:build", "no Python module"),
        ("python:build", "names no function"),
        ("python:{folder}/my_model.py:", "names no function"),
        ("python:{folder}/syntax.py:f", "cannot be imported: SyntaxError"),
        ("python:{folder}/needs.py:f", "needs the package 'no_such_package_here'"),
        ("python:{folder}/fails.py:f", "cannot be imported: ZeroDivisionError: division by zero .line 1 of"),
    ],
)
def test_a_file_or_module_that_is_not_there_is_named(code, spec, said):
    (code.parent / "syntax.py").write_text("def f(:\n")
    (code.parent / "needs.py").write_text("import no_such_package_here\n")
    (code.parent / "fails.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match=said):
        python_module.build(spec.format(folder=code.parent), {}, trust_code=True)


def test_a_skeleton_has_no_memory_unless_the_function_needs_real_numbers(code):
    empty = python_module.skeleton(f"python:{code}:build", {"width": 3}, trust_code=True)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    real = python_module.skeleton(f"python:{code}:real_only", {}, trust_code=True)
    assert {p.device.type for p in real.parameters()} == {"cpu"}
    with pytest.raises(UsageError, match="no weights"):
        python_module.skeleton(f"python:{code}:broken", {"width": 1}, trust_code=True)


def test_an_mlp_is_the_same_function_as_the_layers_written_out():
    torch.manual_seed(0)
    model = mlp([3, 5, 4], activation="gelu", output="softmax").double()
    x = torch.randn(7, 3, dtype=torch.float64)
    first, last = model.layers
    wanted = nn.functional.gelu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(model(x), wanted.exp() / wanted.exp().sum(-1, keepdim=True))


def test_dropout_of_an_mlp_acts_in_training_only():
    model = mlp([8, 64, 1], dropout=0.5)
    x = torch.randn(4, 8)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sizes": [4]}, "two or more whole numbers"),
        ({"sizes": [4, 0]}, "two or more whole numbers"),
        ({"sizes": [4, "x"]}, "two or more whole numbers"),
        ({"sizes": 4}, "two or more whole numbers"),
        ({"sizes": [4, 1], "activation": "relo"}, "unknown activation 'relo'; did you mean 'relu'"),
        ({"sizes": [4, 1], "output": "sigmoyd"}, "unknown output 'sigmoyd'; did you mean 'sigmoid'"),
        ({"sizes": [4, 1], "dropout": 1.5}, "dropout is from 0 up to 1"),
        ({"size": [4, 1]}, "takes no argument 'size' .did you mean 'sizes'"),
    ],
)
def test_wrong_arguments_of_an_mlp_are_named(arguments, said):
    with pytest.raises(UsageError, match=said):
        python_module.build(MLP, arguments, trust_code=False)
