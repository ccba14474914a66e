"""Base models that a function builds: `python:FILE.py:FUNCTION` or `python:package.module:FUNCTION`.

This runs the code it names, so nothing of it is imported before the caller says that the code is trusted.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lora_ft.errors import LoraFtError, UnsafeError, UsageError, did_you_mean

PREFIX = "python:"
OURS = "lora_ft.models.architectures"  # what it lists in __all__ may run without trust; it does nothing but build


class BuildError(UsageError):
    """The function ran and failed."""


def is_spec(model: str) -> bool:
    """Whether a recipe's `model` names a function."""
    return model.startswith(PREFIX)


def check_trusted(spec: str, *, trust_code: bool) -> None:
    """Refuse code that the user did not allow, without reading any of it.

    Raises:
        UnsafeError: the code is not trusted.
        UsageError: the spec names no function, or none of ours.
    """
    home, name = _parts(spec)
    if home == OURS:
        _check_ours(spec, name)
    elif not trust_code:
        raise UnsafeError(
            f"the recipe's model is Python code, which would run on this machine: {spec}",
            where="model",
            fix="read the code, then allow it with --trust-code (trust_code=True from Python)",
        )


def build(spec: str, arguments: Mapping[str, Any], *, trust_code: bool) -> nn.Module:
    """The frozen model that the function gives, in evaluation mode.

    What is random in it depends on torch's seed, which the caller sets.

    Args:
        spec: python:FILE.py:FUNCTION or python:package.module:FUNCTION.
        arguments: of the function, by name.
        trust_code: whether the user allowed this code to run.

    Raises:
        UnsafeError: the code is not trusted; nothing of it has been read then.
        UsageError: no such file or function, arguments that it does not take, or a result that is no model.
    """
    check_trusted(spec, trust_code=trust_code)
    home, name = _parts(spec)
    with _beside(home):
        function = _function(_import(home, spec), name, spec)
        _check_arguments(function, arguments, spec)
        try:
            model = function(**arguments)
        except LoraFtError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise BuildError(f"the function failed: {type(error).__name__}: {_first(error)}", where=spec) from error
    _check_model(model, spec)
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def absolute(spec: str) -> str:
    """The same function, named from any folder."""
    home, name = _parts(spec)
    return f"{PREFIX}{Path(home).resolve()}:{name}" if _is_file(home) else spec


def skeleton(spec: str, arguments: Mapping[str, Any], *, trust_code: bool) -> nn.Module:
    """The same model without memory for its weights (meta device), or in full where the function needs real numbers."""
    try:
        with torch.device("meta"):
            return build(spec, arguments, trust_code=trust_code)
    except BuildError:
        return build(spec, arguments, trust_code=trust_code)


def _parts(spec: str) -> tuple[str, str]:
    """(file or module, function)."""
    home, _, name = spec.removeprefix(PREFIX).rpartition(":")
    if not home or not name.isidentifier():
        raise UsageError(
            f"{spec!r} names no function",
            where="model",
            fix="write python:FILE.py:FUNCTION or python:package.module:FUNCTION",
        )
    return home, name


def _check_ours(spec: str, name: str) -> None:
    known = importlib.import_module(OURS).__all__
    if name not in known:
        raise UsageError(f"there is no function {name!r} in {OURS}; {did_you_mean(name, known)}", where=spec)


def _is_file(home: str) -> bool:
    return home.endswith(".py") or "/" in home or "\\" in home


@contextmanager
def _beside(home: str) -> Iterator[None]:
    """As when Python runs a file: what lies beside it can be imported."""
    if not _is_file(home):
        yield
        return
    folder = str(Path(home).expanduser().resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import(home: str, spec: str) -> ModuleType:
    try:
        return _import_file(Path(home).expanduser(), spec) if _is_file(home) else importlib.import_module(home)
    except LoraFtError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (home == error.name or home.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no Python module {home!r}",
                where=spec,
                fix="check its name, or give the file: python:FILE.py:FUNCTION",
            ) from error
        raise UsageError(f"the code needs the package {error.name!r}, which is not installed", where=spec) from error
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"the code cannot be imported: {type(error).__name__}: {_first(error)}", where=spec) from error


def _import_file(path: Path, spec: str) -> ModuleType:
    """The file as a module whose name no other file, and no other state of this file, has."""
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near) if near else f"there is no .py file in {path.parent}"
        raise UsageError(f"the file {path} does not exist; {hint}", where=spec)
    path = path.resolve()
    name = "lora_ft_user_" + hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UsageError(f"the file {path} is no Python code", where=spec, fix="give a .py file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and type hints of the file look their module up
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _function(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
    what = f"{name!r} is no function" if hasattr(module, name) else f"there is no function {name!r}"
    hint = did_you_mean(name, own) if own else "it defines none"
    raise UsageError(f"{what} in {spec.removeprefix(PREFIX).rpartition(':')[0]}; {hint}", where=spec)


def _check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], spec: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # built-in code without a signature
        return
    parameters = signature.parameters
    named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    problems = []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        strange = [a for a in arguments if a not in named]
        problems += [f"takes no argument {a!r}" + (f" ({did_you_mean(a, named)})" if named else "") for a in strange]
    needed = [n for n in named if parameters[n].default is inspect.Parameter.empty and n not in arguments]
    if needed:
        problems.append(f"needs {', '.join(map(repr, needed))}")
    if problems:
        raise UsageError(
            f"the function {' and '.join(problems)}",
            where=f"{spec}{signature}",
            fix="task: {type: module, arguments: {NAME: VALUE}}",
        )


def _check_model(model: Any, spec: str) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"the function gives {type(model).__name__}, not a torch.nn.Module", where=spec)
    parameters = list(model.named_parameters())
    if not parameters:
        raise UsageError(f"the {type(model).__name__} has no parameters, so there is nothing to adapt", where=spec)
    lazy = [n for n, p in parameters if is_lazy(p)]
    if lazy:
        raise UsageError(
            f"the shape of {lazy[0]} is not known before a first batch", where=spec, fix="give the layer its input size"
        )


def _first(error: Exception) -> str:
    """The first line of a message, and where in the code it was raised."""
    message = (str(error).splitlines() or [""])[0][:200]
    last = error.__traceback__
    if isinstance(error, SyntaxError) or last is None:
        return message
    while last.tb_next is not None:
        last = last.tb_next
    return f"{message} (line {last.tb_lineno} of {last.tb_frame.f_code.co_filename})"
