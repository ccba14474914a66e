"""What a Python program has in memory becomes the rows that a file would give."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lora_ft.data import load_examples
from lora_ft.data.memory import rows_of
from lora_ft.errors import DataError

X = np.arange(6, dtype=np.float64).reshape(3, 2)
Y = np.array([0, 1, 1])


class Pairs(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def fields(data):
    examples, _ = load_examples(data, "auto", {}, kinds=("arrays",))
    return [e.fields for e in examples]


@pytest.mark.parametrize(
    "data",
    [
        (X, Y), (torch.tensor(X), torch.tensor(Y)), (X.tolist(), Y.tolist()), {"inputs": X, "target": Y},
        {"x": X, "y": Y}, TensorDataset(torch.tensor(X), torch.tensor(Y)), Pairs(list(zip(X, Y, strict=True))),
        Pairs([{"inputs": x, "target": y} for x, y in zip(X, Y, strict=True)]),
        [{"inputs": x.tolist(), "target": int(y)} for x, y in zip(X, Y, strict=True)],
    ],
    ids=["arrays", "tensors", "lists", "dict", "aliases", "tensor-dataset", "dataset", "dict-dataset", "dicts"],
)  # fmt: skip
def test_every_form_gives_the_same_examples(data):
    found = fields(data)
    assert [f["target"] for f in found] == [0, 1, 1]
    assert np.array_equal(np.stack([f["inputs"] for f in found]), X)


def test_named_inputs_stay_apart():
    ids = np.array([[1, 2, 3]] * 3)
    for data in (
        ({"features": torch.tensor(X), "ids": ids}, Y),
        {"features": X, "ids": ids, "target": Y},
        Pairs([({"features": x, "ids": i}, y) for x, i, y in zip(X, ids, Y, strict=True)]),
    ):
        found = fields(data)
        assert sorted(found[1]["inputs"]) == ["features", "ids"]
        assert found[1]["inputs"]["features"].tolist() == [2, 3]
        assert found[1]["inputs"]["ids"].dtype.kind == "i"
        assert found[2]["target"] == 1


def test_bfloat16_and_gradients_are_no_obstacle():
    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    assert fields((x, torch.tensor([0.5, 1.5])))[0]["inputs"].tolist() == [1, 1, 1]


def test_rows_of_text_keep_their_columns():
    rows = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
    found, name = load_examples(rows, "auto", {}, kinds=("labelled",))
    assert [e.fields["label"] for e in found] == ["yes", "no"]
    columns, other = load_examples({"text": ["good", "bad"], "label": ["yes", "no"]}, "auto", {}, kinds=("labelled",))
    assert (name, [e.fields for e in columns]) == (other, [e.fields for e in found])


def test_a_table_is_its_columns():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": [1.0, 2.0], "b": [3, 4], "target": [0, 1]})
    assert [(f["inputs"].tolist(), f["target"]) for f in fields(table)] == [([1.0, 3.0], 0), ([2.0, 4.0], 1)]


def test_the_place_of_a_row_is_its_python_index():
    assert [r.where for r in rows_of((X, Y), "train")] == ["train[0]", "train[1]", "train[2]"]


class Endless(IterableDataset):
    def __iter__(self):
        yield from range(3)


class Broken(Pairs):
    def __getitem__(self, i):
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "where", "said"),
    [
        ((X, Y[:2]), "data", "different numbers of rows: inputs 3, target 2"),
        ({"inputs": X, "target": 3}, "data", "'target' is a int, not an array or list"),
        (([], []), "data", "there is no row"),
        (7, "data", "this int is no data"),
        (Endless(), "data", "this Endless is no data: it has no length"),
        (Pairs([(1, 2, 3)]), "data[0]", "an item is a tuple of 3"),
        (Pairs([(X[0], 1), "text"]), "data[1]", "an item is a str"),
        (Broken([1, 2]), "data[0]", "Broken gives no item: OSError: the disk is gone"),
    ],
)
def test_what_is_no_data_is_named(data, where, said):
    with pytest.raises(DataError, match=said) as caught:
        rows_of(data)
    assert caught.value.where == where
