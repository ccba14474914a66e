"""Read and write recipe YAML: version 1.2 (so 1e-4 is a number and `no` a word), no tags, no duplicate keys."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean
from ruamel.yaml.scalarfloat import ScalarFloat
from ruamel.yaml.scalarint import ScalarInt
from ruamel.yaml.scalarstring import ScalarString

from lora_ft.errors import UsageError

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000  # after aliases are followed: stops a file of a few lines that expands to gigabytes

Lines = dict[tuple[str, ...], int]


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """Plain values of a recipe file, and the line (from 1) of each key path.

    Raises:
        UsageError: the file is missing, not YAML, has duplicate keys or tags, or is not a mapping.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"recipe is larger than {MAX_BYTES:,} bytes", where=str(path))
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"recipe cannot be read: {reason}", where=str(path), fix="lora-ft init") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """The same from a string; `name` stands for the file in messages."""
    try:
        tree = YAML(typ="rt", pure=True).load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise UsageError(f"{str(error.problem).split(' with value')[0]}", where=f"{name}:{line}") from error
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) if isinstance(error, MarkedYAMLError) else None
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UsageError(f"not valid YAML: {getattr(error, 'problem', None) or error}", where=where) from error
    if tree is None:
        raise UsageError("the recipe is empty", where=name, fix="lora-ft init")
    if not isinstance(tree, CommentedMap):
        raise UsageError("a recipe is a mapping of keys to values", where=name, fix="lora-ft schema")
    lines: Lines = {}
    plain = _plain(tree, (), lines, [MAX_VALUES], name)
    return dict(plain), lines


def _plain(node: Any, path: tuple[str, ...], lines: Lines, budget: list[int], name: str) -> Any:
    budget[0] -= 1
    if budget[0] < 0:
        raise UsageError(f"recipe expands to more than {MAX_VALUES:,} values", where=name)
    if isinstance(node, TaggedScalar) or (isinstance(node, CommentedMap | CommentedSeq) and _tag(node)):
        raise UsageError("YAML tags are not allowed in a recipe", where=f"{name}:{lines.get(path, 0)}")
    if isinstance(node, CommentedMap):
        out: dict[str, Any] = {}
        for key, value in node.items():
            at = (*path, str(key))
            lines[at] = node.lc.key(key)[0] + 1
            out[str(key)] = _plain(value, at, lines, budget, name)
        return out
    if isinstance(node, CommentedSeq):
        lines |= {(*path, str(i)): node.lc.item(i)[0] + 1 for i in range(len(node))}
        return [_plain(v, (*path, str(i)), lines, budget, name) for i, v in enumerate(node)]
    return _scalar(node)


def _tag(node: Any) -> bool:
    value = getattr(node.tag, "value", None)
    return value is not None and not str(value).startswith("tag:yaml.org")


def _scalar(node: Any) -> Any:
    for kind, plain in ((ScalarBoolean, bool), (ScalarFloat, float), (ScalarInt, int), (ScalarString, str)):
        if isinstance(node, kind):
            return plain(node)
    return node


def parse_scalar(text: str) -> Any:
    """A value from the command line, read as the same text would be in a recipe file."""
    try:
        tree = YAML(typ="rt", pure=True).load(text)
    except YAMLError:
        return text
    return _plain(tree, (), {}, [MAX_VALUES], "--set")


def write_yaml(values: Mapping[str, Any], comments: Mapping[tuple[str, ...], str], heading: str = "") -> str:
    """YAML text of nested values with an end-of-line comment for each key path that has one."""
    out = io.StringIO()
    writer = YAML(pure=True)
    writer.width = 4096
    writer.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    writer.dump(_commented(values, (), comments), out)
    lead = "".join(f"# {line}\n" for line in heading.splitlines())
    return lead + out.getvalue()


def _commented(values: Mapping[str, Any], path: tuple[str, ...], comments: Mapping[tuple[str, ...], str]) -> Any:
    node = CommentedMap()
    for key, value in values.items():
        at = (*path, key)
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            node[key] = [_commented(v, (*at, str(i)), comments) for i, v in enumerate(value)]
            continue
        nested = isinstance(value, Mapping) and value
        node[key] = _commented(value, at, comments) if nested else value
        if at in comments and not nested:
            node.yaml_add_eol_comment(comments[at], key, column=44)
    return node
