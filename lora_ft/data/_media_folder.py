"""Folders of images and sounds: a folder for each class, images with masks, or files alone."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from lora_ft.errors import DataError, Problem

from ._media_kind import IMAGE, kind_of_file
from ._row import Row

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"})
IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img"})
MASK_FOLDERS = frozenset({"masks", "mask", "annotations", "annotation", "labels", "label", "segmentations"})
MASK_END = "_mask"
JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
SHOWN = 3
LAYOUT = "a folder for each class (CLASS/FILE), images/ and masks/ with files of the same names, or files alone"


@dataclass(frozen=True)
class _Found:
    """Files below a folder, as paths relative to it."""

    root: Path
    media: tuple[PurePosixPath, ...]
    others: tuple[PurePosixPath, ...]

    def rows(self, values: Iterable[Mapping[str, str]], column: str) -> list[Row]:
        folder = str(self.root.resolve())
        return [Row(v, str(self.root / v[column]), folder) for v in values]

    def tops(self) -> dict[str, None]:
        """The folders right below the root that hold media, at whatever depth."""
        return dict.fromkeys(p.parts[0] for p in self.media if len(p.parts) > 1)


def has_media(path: Path) -> bool:
    """Whether there is an image or sound somewhere below a folder."""
    return bool(_walk(path).media)


def rows_of_folder(path: Path) -> list[Row] | None:
    """A row for each image or sound below a folder, its values relative to it; None where there is no file at all.

    Args:
        path: CLASS/FILE gives image or audio, and label; images/FILE with masks/FILE, or FILE with FILE_mask, gives
            image and mask; files alone give rows without an answer, to predict.

    Raises:
        DataError: a layout that is none of these, images and sounds in one folder, images without masks, links that
            lead elsewhere, or only files of other kinds.
    """
    found = _walk(path)
    if not found.media:
        if not found.others:
            return None
        raise DataError(
            f"no image or sound in this folder; it has {_kinds(found.others)}", where=str(path), fix=f"give {LAYOUT}"
        )
    column = _only_kind(found)
    tops = found.tops()
    lower = {name.lower(): name for name in tops}
    if tops and SPLITS.issuperset(lower):
        raise _splits(found, lower)
    masks = [name for name in tops if name.lower() in MASK_FOLDERS]
    images = [name for name in tops if name.lower() in IMAGE_FOLDERS]
    if column == IMAGE and images and masks:
        return _pairs(found, images, masks)
    if column == IMAGE and not tops and any(p.stem.endswith(MASK_END) for p in found.media):
        return _pairs(found, [], [])
    if tops and not (len(tops) == len(images) == 1 and all(len(p.parts) == 2 for p in found.media)):
        return _classes(found, column)
    return found.rows(({column: str(p)} for p in found.media), column)


def _walk(root: Path) -> _Found:
    media: list[PurePosixPath] = []
    others: list[PurePosixPath] = []
    links: list[Path] = []
    for place, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if not _ignored(name)]
        here = Path(place)
        links += [here / name for name in folders if (here / name).is_symlink()]
        for file in (here / name for name in files if not _ignored(name)):
            if file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
                links.append(file)
            else:
                relative = PurePosixPath(file.relative_to(root).as_posix())
                (media if kind_of_file(file.name) else others).append(relative)
    if links:
        raise DataError.collect(
            [Problem(f"links to {link.resolve()}, and is not followed", str(link)) for link in sorted(links)],
            title=f"{len(links)} links to folders, or to files outside of this one, are not followed",
            fix="copy what they lead to into the folder, or give a table of paths with data.media_root",
        )
    return _Found(root, tuple(sorted(media)), tuple(sorted(others)))


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"cannot be read: {error.strerror}", where=str(error.filename)) from error


def _ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def _only_kind(found: _Found) -> str:
    kinds = Counter(kind_of_file(p.name) for p in found.media)
    if len(kinds) > 1:
        shown = ", ".join(f"{n} of kind {kind}" for kind, n in kinds.items())
        raise DataError(
            f"images and sounds in one folder: {shown}", where=str(found.root), fix="give a folder of one kind"
        )
    return next(iter(kinds))


def _splits(found: _Found, lower: Mapping[str, str]) -> DataError:
    paths = {key: found.root / name for key, name in lower.items()}
    train = next((p for key, p in paths.items() if key.startswith("train")), next(iter(paths.values())))
    held = next((p for p in paths.values() if p != train), None)
    return DataError(
        f"this folder holds splits ({', '.join(p.name for p in paths.values())}), not classes",
        where=str(found.root),
        fix=f"name the subfolder: data.train={train}" + (f" data.eval={held}" if held else ""),
    )


def _classes(found: _Found, column: str) -> list[Row]:
    """Rows with the folder's name as label; every file must lie in a folder of a class, right below it."""
    problems = [
        Problem(
            "lies beside the folders of classes, so it has no class"
            if len(p.parts) == 1
            else f"lies deeper than CLASS/FILE: is its class {p.parts[0]!r} or {p.parts[-2]!r}?",
            str(found.root / p),
        )
        for p in found.media
        if len(p.parts) != 2
    ]
    if problems:
        raise DataError.collect(
            problems,
            title=f"{len(problems)} of {len(found.media)} files are not in a folder of a class",
            fix=f"name the folder whose subfolders are the classes; readable: {LAYOUT}",
        )
    tops = found.tops()
    lost = Counter(p.parts[0] for p in found.others if len(p.parts) > 1 and p.parts[0] not in tops)
    if lost:
        name = next(iter(lost))
        inside = [p for p in found.others if p.parts[0] == name]
        raise DataError(
            f"the folder {name!r} holds nothing of kind {column}; it has {_kinds(inside)}",
            where=str(found.root / name),
            fix="convert these files, or take the folder away",
        )
    return found.rows(({column: str(p), "label": p.parts[0]} for p in found.media), column)


def _pairs(found: _Found, images: Sequence[str], masks: Sequence[str]) -> list[Row]:
    """Rows of an image and the mask of its name; without folders, a mask is the file whose name ends in _mask."""
    if len(images) > 1 or len(masks) > 1:
        raise DataError(
            f"more than one folder of images or of masks: {', '.join([*images, *masks])}",
            where=str(found.root),
            fix="keep one of each",
        )
    inner = {p.parts[1].lower() for p in found.media if p.parts[0] in images and len(p.parts) > 2}
    if inner and inner <= SPLITS:
        raise DataError(
            f"{images[0]}/ holds splits ({', '.join(sorted(inner))})",
            where=str(found.root),
            fix=f"make a folder for each split with its own {images[0]}/ and {masks[0]}/",
        )
    sides: dict[str, dict[str, PurePosixPath]] = {"image": {}, "mask": {}}
    problems = []
    for path in found.media:
        side = _side(path, images, masks)
        name = str(found.root / path)
        if not side:
            problems.append(Problem(f"neither in {images[0]}/ nor in {masks[0]}/", name))
            continue
        stem = path.stem.removesuffix(MASK_END) if side == "mask" else path.stem
        key = "/".join([*path.parts[1 if images else 0 : -1], stem])
        if key in sides[side]:
            problems.append(Problem(f"a second {side} of this name, beside {sides[side][key].name}", name))
        sides[side].setdefault(key, path)
    problems += _alone(found.root, sides["image"], sides["mask"], "an image without a mask")
    problems += _alone(found.root, sides["mask"], sides["image"], "a mask without an image")
    if problems:
        raise DataError.collect(
            problems,
            title=f"{len(problems)} files do not pair up",
            fix="an image and its mask have the same name but for the suffix, or the mask's name ends in _mask",
        )
    values = ({"image": str(path), "mask": str(sides["mask"][key])} for key, path in sides["image"].items())
    return found.rows(values, "image")


def _alone(
    root: Path, these: Mapping[str, PurePosixPath], those: Mapping[str, PurePosixPath], what: str
) -> list[Problem]:
    return [Problem(what, str(root / path)) for key, path in these.items() if key not in those]


def _side(path: PurePosixPath, images: Sequence[str], masks: Sequence[str]) -> str:
    """Image, mask, or "" for a file in neither folder."""
    if not images:
        return "mask" if path.stem.endswith(MASK_END) else "image"
    top = path.parts[0] if len(path.parts) > 1 else ""
    return "image" if top in images else "mask" if top in masks else ""


def _kinds(paths: Sequence[PurePosixPath]) -> str:
    counts = Counter(p.suffix.lower() or "no suffix" for p in paths).most_common()
    more = f" and {len(counts) - SHOWN} more kinds" if len(counts) > SHOWN else ""
    return ", ".join(f"{n} x {suffix}" for suffix, n in counts[:SHOWN]) + more
