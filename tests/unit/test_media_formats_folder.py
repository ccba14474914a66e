"""A folder of images or sounds is a data set; a folder that could mean two things, or loses a file, is refused."""

import os

import pytest

from lora_ft.data import load_examples
from lora_ft.data._media_folder import rows_of_folder
from lora_ft.errors import DataError


@pytest.fixture
def tree(tmp_path):
    """Makes files of one byte in a folder, and gives the folder."""

    def make(*names):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        return folder

    return make


def values(folder):
    rows = rows_of_folder(folder)
    column = "image" if "image" in rows[0].values else "audio"
    assert [r.where for r in rows] == [str(folder / r.values[column]) for r in rows]
    assert {r.folder for r in rows} == {str(folder.resolve())}
    return [dict(r.values) for r in rows]


def test_a_folder_for_each_class_gives_labels_in_a_fixed_order_and_leaves_out_what_systems_put_there(tree):
    folder = tree(
        "dog/b.png", "dog/a.JPG", "cat/c.webp", "cat/.hidden.png", ".git/x.png", "__MACOSX/cat/c.png", "cat/Thumbs.db",
        "cat/about.md",
    )  # fmt: skip
    assert values(folder) == [
        {"image": "cat/c.webp", "label": "cat"},
        {"image": "dog/a.JPG", "label": "dog"},
        {"image": "dog/b.png", "label": "dog"},
    ]
    examples, name = load_examples(str(folder), "auto", {}, kinds=("labelled_image",))
    assert (name, examples[0].fields, examples[0].root) == (
        "labelled_image", {"image": "cat/c.webp", "label": "cat"}, str(folder.resolve()),
    )  # fmt: skip


def test_sounds_in_folders_of_classes_are_labelled_sounds(tree):
    folder = tree("yes/a.wav", "no/a.flac")
    assert values(folder) == [{"audio": "no/a.flac", "label": "no"}, {"audio": "yes/a.wav", "label": "yes"}]
    assert load_examples(str(folder), "auto", {}, kinds=("labelled_audio",))[1] == "labelled_audio"


def test_files_alone_are_rows_to_predict_and_nothing_to_train_on(tree):
    folder = tree("b.png", "a.png")
    assert values(folder) == [{"image": "a.png"}, {"image": "b.png"}]
    for kind in ("labelled_image", "image_mask", "boxes"):
        examples, _ = load_examples(str(folder), "auto", {}, kinds=(kind,), answered=False)
        assert [e.fields for e in examples] == [{"image": "a.png"}, {"image": "b.png"}]
    with pytest.raises(DataError, match="no known format has the columns image"):
        load_examples(str(folder), "auto", {}, kinds=("labelled_image",))


def test_a_folder_called_images_alone_is_no_class(tree):
    assert values(tree("images/a.png", "images/b.png")) == [{"image": "images/a.png"}, {"image": "images/b.png"}]


@pytest.mark.parametrize("masks", ["masks", "annotations", "Labels", "mask"])
def test_images_pair_with_masks_of_the_same_name(tree, masks):
    folder = tree("images/a.jpg", "images/in/b.jpg", f"{masks}/a.png", f"{masks}/in/b_mask.png")
    assert values(folder) == [
        {"image": "images/a.jpg", "mask": f"{masks}/a.png"},
        {"image": "images/in/b.jpg", "mask": f"{masks}/in/b_mask.png"},
    ]
    assert load_examples(str(folder), "auto", {}, kinds=("image_mask",))[1] == "image_mask"


def test_masks_beside_their_images_are_known_by_the_end_of_their_names(tree):
    assert values(tree("a.jpg", "a_mask.png")) == [{"image": "a.jpg", "mask": "a_mask.png"}]


def test_images_and_masks_that_do_not_pair_up_are_all_named(tree):
    folder = tree(
        "images/a.jpg", "images/b.jpg", "masks/b.png", "masks/c.png", "masks/b_mask.png", "other/d.png", "e.png"
    )
    with pytest.raises(DataError, match="5 files do not pair up") as caught:
        rows_of_folder(folder)
    assert [line.strip() for line in caught.value.where.splitlines()] == [
        f"{folder}/e.png: neither in images/ nor in masks/",
        f"{folder}/masks/b_mask.png: a second mask of this name, beside b.png",
        f"{folder}/other/d.png: neither in images/ nor in masks/",
        f"{folder}/images/a.jpg: an image without a mask",
        f"{folder}/masks/c.png: a mask without an image",
    ]


@pytest.mark.parametrize(
    ("names", "said", "fix"),
    [
        (["train/cat/a.png", "test/cat/b.png"], r"holds splits \(test, train\), not classes",
         "name the subfolder: data.train={0}/train data.eval={0}/test"),
        (["train/a.png"], r"holds splits \(train\)", "data.train={0}/train"),
        (["validation/a.wav", "Training/b.wav"], "holds splits", "data.train={0}/Training data.eval={0}/validation"),
        (["images/train/a.png", "masks/train/a.png"], r"images/ holds splits \(train\)", "its own images/ and masks/"),
        (["images/a.png", "masks/a.png", "labels/a.png"], "more than one folder of images or of masks", "one of each"),
        (["cat/a.png", "dog/a.wav"], "images and sounds in one folder: 1 of kind image, 1 of kind audio", "one kind"),
        (["cat/a.png", "b.png"], "lies beside the folders of classes", "whose subfolders are the classes"),
        (["cat/persian/a.png", "cat/b.png"], "lies deeper than CLASS/FILE: is its class 'cat' or 'persian'", "classes"),
        (["images/cat/a.png"], "lies deeper than CLASS/FILE", "classes"),
        (["cat/a.png", "dog/a.heic", "dog/b.heic"], "the folder 'dog' holds nothing of kind image; it has 2 x .heic",
         "convert"),
        (["a.mp4", "b/c.mp4", "d"], "no image or sound in this folder; it has 2 x .mp4, 1 x no suffix", "give"),
    ],
)  # fmt: skip
def test_a_folder_that_could_mean_two_things_or_loses_files_is_refused(tree, names, said, fix):
    folder = tree(*names)
    with pytest.raises(DataError, match=said) as caught:
        rows_of_folder(folder)
    assert fix.format(folder) in caught.value.fix
    assert caught.value.exit_code == 3


def test_links_never_lead_out_of_the_folder_nor_around_in_it(tree, tmp_path):
    folder = tree("cat/a.png")
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "cat" / "b.png").symlink_to(folder / "cat" / "a.png")
    assert [v["image"] for v in values(folder)] == ["cat/a.png", "cat/b.png"]
    (folder / "cat" / "c.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=f"links to {tmp_path.resolve()}/secret.png, and is not followed") as caught:
        rows_of_folder(folder)
    assert caught.value.where == f"{folder}/cat/c.png"
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    with pytest.raises(DataError, match=r"2 links .* are not followed"):
        rows_of_folder(folder)


def test_an_empty_folder_has_no_rows_and_one_that_is_locked_is_an_error(tree, monkeypatch):
    folder = tree()
    (folder / "cat").mkdir()
    assert rows_of_folder(folder) is None
    with pytest.raises(DataError, match="no data file in this folder, and no image or sound"):
        load_examples(str(folder), "auto", {})

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        rows_of_folder(folder)


def test_a_table_in_the_folder_says_what_the_images_are(tree):
    folder = tree("train/a.png", "train/b.png")
    (folder / "train" / "metadata.csv").write_text("file_name,label\na.png,cat\nb.png,dog\n")
    examples, name = load_examples(str(folder), "auto", {}, kinds=("labelled_image",))
    assert (name, [e.fields["image"] for e in examples]) == ("labelled_image", ["a.png", "b.png"])
    assert {e.root for e in examples} == {str((folder / "train").resolve())}


def test_a_readme_beside_images_is_no_data(tmp_path):
    from PIL import Image

    from lora_ft.data import read_rows

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    (tmp_path / "README.txt").write_text("Thanks for all the fish.")
    assert [r.values["label"] for r in read_rows(str(tmp_path))] == ["cat", "dog"]
