"""How a method that PEFT lacks becomes one of PEFT's: saved, loaded, switched and deleted like LoRA.

A method is a config dataclass, a module that computes what to add to a layer's output, and

    plug_in(KEY, Config, Tuner)          with    class Layer(AdapterLayer), class Tuner(AdapterTuner)

The parameters of adapter N on module M are saved as `M.<prefix>.<...>` and live in the model as `M.<prefix>.N.<...>`.
They are float32 whatever the base is (float64 on a float64 base); the sum is cast back to the dtype of the output.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists, onload_layer
from torch import Tensor, nn

from .blocks import Block, transformer_blocks
from .errors import AdapterError
from .layer import AdapterLayer
from .modules import is_linear, lookup, walk

WRITTEN = "written"  # metadata of a config field that the tuner fills in, never a user


class PluginType(str):
    """A PEFT type outside PEFT's closed enum: equal to its string, with the enum's `name` and `value`."""

    __slots__ = ()
    name = property(str.__str__)
    value = property(str.__str__)


@dataclass
class AdapterConfig(PeftConfig):
    """Options that every method of ours has; the names are PEFT's.

    Attributes:
        target_modules: names, their last parts, or a regex; None when the method finds its modules itself. Empty once
            the adapter is on a model: `adapted_modules` has the whole names then.
        exclude_modules: names or a regex of modules to leave alone.
        modules_to_save: modules that are trained and saved whole beside the adapter.
        layers_to_transform: numbers of the blocks to adapt, from 0; where the method finds its modules itself, negative
            ones count from the end.
        layers_pattern: names of the lists that `layers_to_transform` counts in; None for all.
        adapted_modules: whole names of the modules that carry the adapter; written, not chosen.
    """

    peft_key: ClassVar[PluginType]

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    adapted_modules: list[str] | None = field(default=None, metadata={WRITTEN: True})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = self.peft_key
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear" and self.layers_to_transform:
            raise ValueError("layers_to_transform goes with a list of target_modules, not with a regex")


def plug_in(key: PluginType, config_class: type[AdapterConfig], tuner_class: type["AdapterTuner"]) -> None:
    """Make PEFT know a method; doing it again changes nothing.

    Raises:
        ValueError: the key or the prefix belongs to another method.
    """
    configs: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING  # PEFT's annotation knows its enum only
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: dict[Any, str] = PEFT_TYPE_TO_PREFIX_MAPPING
    taken = [k for k, p in prefixes.items() if (k == key) != (p == tuner_class.prefix)]
    if taken or tuners.get(key, tuner_class) is not tuner_class:
        raise ValueError(f"{key} or its prefix {tuner_class.prefix!r} is taken{f' by {taken[0]}' if taken else ''}")
    configs[key], tuners[key], prefixes[key] = config_class, tuner_class, tuner_class.prefix


class AdapterTuner(BaseTuner):
    """What PEFT calls to put adapters of one method on a model."""

    prefix: str
    tuner_layer_cls: type[AdapterLayer]

    def find(self, config: Any, model: nn.Module) -> list[str]:
        """Whole names of the modules to adapt when the config names none.

        Raises:
            AdapterError: the model has none.
        """
        raise AdapterError("this method does not find its modules itself", "give target_modules")

    def expand(self, config: Any, names: list[str], model: nn.Module) -> list[str]:
        """The modules to wrap for the ones that were found or named."""
        return names

    def build(self, config: Any, layer: AdapterLayer, name: str, adapter_name: str) -> nn.Module:
        """A fresh adapter for the module called `name`, which changes nothing yet."""
        raise NotImplementedError

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, but a name that cannot be a module's is refused before anything changed."""
        if "." in adapter_name or not adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise AdapterError(f"{adapter_name!r} cannot be an adapter's name", "a word without dots, such as default")
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """PEFT warns of tied embeddings; ours act on outputs or say what they do to ties."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        config: AdapterConfig = peft_config
        if config.adapted_modules is None:
            names = self.find(config, model) if not config.target_modules else _named(config, model)
            names = self.expand(config, names, model)
            config.adapted_modules = [n for n in names if _kept_out(config, n) is False]
            if not config.adapted_modules:
                raise AdapterError(f"no module to adapt is left of {names or config.target_modules}")
            # PEFT saves the whole base head when it reads `lm_head` in this list.
            config.target_modules = None
        there = {n for n, _ in walk(model)}
        missing = [n for n in config.adapted_modules if n not in there]
        if missing:
            raise AdapterError(f"the adapter is for a model with {missing[0]!r}, which this one lacks")

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return True if key in peft_config.adapted_modules else _kept_out(peft_config, key)

    def _create_and_replace(self, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT never visits what lies inside a module that an earlier adapter wraps, so the first visit does it all.
        for name in peft_config.adapted_modules:
            _, module = lookup(self.model, name)
            if isinstance(module, self.tuner_layer_cls):
                layer = module
            else:
                layer = self.tuner_layer_cls(module)
                _replace(self.model, module, layer)
            if adapter_name not in layer.adapters:
                layer.add(adapter_name, self.build(peft_config, layer, name, adapter_name))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        for layer in self._layers():
            reason = layer.merge_refusal()
            if reason:
                raise NotImplementedError(f"this adapter cannot be merged: {reason}")

    def _layers(self) -> list[AdapterLayer]:
        return [m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls)]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """As PEFT's, which would leave behind layers inside other layers and second places of a shared module."""
        if merge:
            self._check_merge_allowed()
        for layer in self._layers():
            if merge:
                with onload_layer(layer):
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.release(layer)
        for layer in self._layers():
            _replace(self.model, layer, layer.base_layer)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def release(self, layer: AdapterLayer) -> None:
        """Undo what a method did outside of the layer itself."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As PEFT's, and what PEFT dropped because another adapter is called like a part of the path ("0")."""
        mark = f".{cls.prefix}.{adapter_name}."
        there = [k for k in model.state_dict() if mark in k]
        whole = state_dict if all(k in state_dict for k in there) else model.state_dict()
        return {k: whole[k] for k in there}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, which misses the second place of a module that stands in two."""
        mark = f".{cls.prefix}.{adapter_name}."
        names = {cls._remove_adapter_name_from_key(k, adapter_name): k for k in model.state_dict() if mark in k}
        bare = "base_model.model."
        names |= {f"{bare}{saved}": k for saved, k in names.items() if not saved.startswith(bare)}
        return {names.get(k, k): v for k, v in state_dict.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, found, tail = key.rpartition(f".{cls.prefix}.{adapter_name}.")
        return f"{head}.{cls.prefix}.{tail}" if found else key


def chosen_blocks(config: AdapterConfig, model: nn.Module) -> list[Block]:
    """The blocks that `layers_to_transform` and `layers_pattern` leave.

    Raises:
        AdapterError: the model has no list of blocks, or none of these numbers.
    """
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    blocks = transformer_blocks(model)
    if patterns:
        lists = {b.name: (f".{b.stack}", f".{b.name.rpartition('.')[0]}") for b in blocks}
        blocks = [b for b in blocks if any(n.endswith(f".{p}") for n in lists[b.name] for p in patterns)]
    wanted = config.layers_to_transform
    if wanted is None:
        return blocks
    assert isinstance(wanted, list)
    size = {b.stack: sum(1 for c in blocks if c.stack == b.stack) for b in blocks}
    found = [b for b in blocks if b.index in wanted or b.index - size[b.stack] in wanted]
    if not found:
        raise AdapterError(f"layers_to_transform {wanted} names no block; there are {size}")
    return found


def _named(config: AdapterConfig, model: nn.Module) -> list[str]:
    """Names that `target_modules` matches, by PEFT's rules."""
    names = [n for n, _ in walk(model) if n]
    if config.target_modules == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return [n for n, m in walk(model) if n and is_linear(m) and lookup(model, n)[1] is not head]
    found = [n for n in names if check_target_module_exists(config, n)]
    if not found:
        raise AdapterError(f"target_modules {config.target_modules!r} matches no module; names look like {names[-1]!r}")
    return found


def _kept_out(config: AdapterConfig, name: str) -> Any:
    """PEFT's marker (false, but not False) when `exclude_modules` or `modules_to_save` has this name, else False."""
    rules = {"exclude_modules": config.exclude_modules, "modules_to_save": config.modules_to_save}
    probe = SimpleNamespace(target_modules=(), target_parameters=None, **rules)
    result = check_target_module_exists(probe, name)
    return result if type(result) is not bool else False


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place of the model where `old` stands."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
