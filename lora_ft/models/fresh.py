"""Which modules of a loaded model start at random because its files do not hold them."""

from collections.abc import Iterable

from torch import nn

from lora_ft_adapters.blocks import stacks


def fresh_modules(model: nn.Module, missing: Iterable[str]) -> tuple[str, ...]:
    """The modules all of whose parameters are `missing` from the files, outermost first; () when one is only in part.

    A part-missing module is no new head but a broken file. One exception, and only beside a fresh module: a missing
    vector that the architecture starts at zero (the vocabulary bias of a masked-lm head whose matrix is the embedding)
    is the same in every load, so it needs neither training nor a file. What is in a block, or embeds the input, is
    no head either, however whole it is missing.
    """
    absent = set(missing)
    chosen: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{p}" for p, _ in module.named_parameters()}
        if isinstance(module, nn.ModuleList | nn.ModuleDict):  # PEFT saves what they hold, not the list
            continue
        if name and own and own <= absent and not any(name.startswith(f"{c}.") for c in chosen):
            chosen.append(name)
    covered = {f"{c}.{p}" for c in chosen for p, _ in model.get_submodule(c).named_parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    rest = [named.get(name) for name in absent - covered]
    zeros = all(p is not None and p.dim() == 1 and not bool(p.any()) for p in rest)
    return tuple(chosen) if zeros and not any(_of_the_body(c, model) for c in chosen) else ()


def _of_the_body(name: str, model: nn.Module) -> bool:
    """Whether a module is in a block, holds one, or holds the input's embedding."""
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # Transformers' models that read no tokens
        embedding = None
    if embedding is not None and any(m is embedding for m in model.get_submodule(name).modules()):
        return True
    return any(f"{name}.".startswith(f"{b.name}.") or f"{b.name}.".startswith(f"{name}.") for b in stacks(model))
