"""Recipes, presets and `--set` values laid over each other, with the origin of each value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .sections import quant_shorthand, shorthand

KeyPath = tuple[str, ...]
EXCLUSIVE = ("train", ("epochs", "steps"))  # one of these, whichever came last
TYPED = {"method": shorthand, "task": shorthand, "quant": quant_shorthand}  # sections whose keys belong to their type
STAGES = "stages"


@dataclass
class Merge:
    """Values and origins of everything laid over each other so far."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def add(self, values: Mapping[str, Any], origin: Mapping[KeyPath, str], path: KeyPath = ()) -> None:
        """Lay `values` over what is there: mappings merge, everything else replaces."""
        for key, given in values.items():
            at = (*path, key)
            value = _as_mapping(at, given)
            if value is not given and at in origin:
                origin = {**origin, **{(*at, own): origin[at] for own in value}}
            if isinstance(value, Mapping):
                if _is_typed(at) and "type" in value and value["type"] != self.at(at).get("type"):
                    self.clear(at)  # another type's options would not fit this one
                if not isinstance(self.at(path).get(key), dict):
                    assign(self.values, at, {})
                self.add(value, origin, at)
            else:
                assign(self.values, at, value)
                self.origins[at] = origin.get(at, origin.get(("*",), ""))

    def layer(self, values: Mapping[str, Any], origin: Mapping[KeyPath, str]) -> None:
        """Add one source. Of two settings that exclude each other, that of the later source stays."""
        self.add(values, origin)
        parts = {(): values} | {(STAGES, k): v for k, v in _mapping(_as_mapping((STAGES,), values.get(STAGES))).items()}
        for path, part in parts.items():
            section = _mapping(_mapping(part).get(EXCLUSIVE[0]))
            given = [k for k in EXCLUSIVE[1] if section.get(k) is not None]
            for other in EXCLUSIVE[1]:
                if len(given) == 1 and other != given[0]:
                    self.at((*path, EXCLUSIVE[0])).pop(other, None)
                    self.origins.pop((*path, EXCLUSIVE[0], other), None)

    def at(self, path: KeyPath) -> dict[str, Any]:
        """The mapping at a path, {} where there is none."""
        node: Any = self.values
        for key in path:
            node = node.get(key, {}) if isinstance(node, dict) else {}
        return node if isinstance(node, dict) else {}

    def clear(self, path: KeyPath) -> None:
        """Empty a section."""
        assign(self.values, path, {})
        self.origins = {p: o for p, o in self.origins.items() if p[: len(path)] != path}


def names_a_type(key: str) -> bool:
    """Whether a `--set` key changes a section's type, which clears its options: those given beside it come after."""
    path = tuple(key.removesuffix(".type").split("."))
    return _is_typed(path)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_typed(at: KeyPath) -> bool:
    """Whether this is a section with a type, of the recipe or of one stage."""
    return at[-1] in TYPED and (len(at) == 1 or (at[0] == STAGES and len(at) == 3))


def _as_mapping(at: KeyPath, value: Any) -> Any:
    """`task: NAME` as {type: NAME}; a list of stages by number, so that a later source can set a key of one."""
    if at == (STAGES,) and isinstance(value, list | tuple):
        return {str(i): v for i, v in enumerate(value)}
    return TYPED[at[-1]](value) if _is_typed(at) else value


def assign(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set a value by its path."""
    node = values
    for key in path[:-1]:
        inner = node.get(key)
        if not isinstance(inner, dict):
            inner = node[key] = {}
        node = inner
    node[path[-1]] = value
