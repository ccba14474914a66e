"""Artifacts of small models, as an export format is given them."""

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

from lora_ft.artifact import Artifact, Subject
from lora_ft_adapters import add_adapter, build_config, load_adapter, merge, save_adapter
from lora_ft_adapters.weights import StateWeights


def logits(model, batch):
    """What most tasks compare artifacts by."""
    return model(**batch).logits


def artifact_of(  # noqa: PLR0913 - each is what one test varies
    config, folder, tokenizer, *, auto_class="AutoModelForCausalLM", method="lora", options=None, task="causal-lm",
    dtype="float32", outputs=logits, generation=None, inputs=None, pooling="",
):  # fmt: skip
    """(artifact, PeftModel in memory) of a model with random weights and a random adapter that is saved in `folder`.

    Args:
        config: Transformers' config of the base.
        folder: for the adapter, made if need be.
        tokenizer: saved beside it.
        method: with `options`; LoRA's start is random.
    """
    kind = getattr(transformers, auto_class)
    torch.manual_seed(7)
    base = kind.from_config(copy.deepcopy(config)).eval().requires_grad_(False)
    with torch.no_grad():
        for p in base.parameters():  # biases and norms that are not 0 and 1, so that a mix-up shows
            p.add_(torch.randn_like(p) * 0.05)
    options = dict(options if options is not None else {"r": 4, "lora_alpha": 16, "init_lora_weights": False})
    peft_type = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSequenceClassification": "SEQ_CLS"}.get(auto_class)
    adapted = add_adapter(copy.deepcopy(base), build_config(method, options, peft_type, base)).eval()
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    save_adapter(adapted, folder, base="tiny")
    tokenizer.save_pretrained(str(folder))
    with torch.device("meta"):
        empty = kind.from_config(copy.deepcopy(config))

    def read(path: Path):
        return kind.from_pretrained(str(path), dtype=getattr(torch, dtype, torch.float32)).eval()

    def merged():
        return tensors(merge(load_adapter(copy.deepcopy(base), folder)))

    def tensors(model):
        shared = {n for n in model.state_dict() if n in (getattr(model, "_tied_weights_keys", None) or ())}
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        return StateWeights({n: t for n, t in model.state_dict().items() if not (tied and n in shared)})

    subject = Subject(
        task, auto_class, method, build_config(method, options, peft_type, base), empty,
        options=SimpleNamespace(pooling=pooling), processor=tokenizer,
    )  # fmt: skip
    artifact = Artifact(
        subject=subject, folder=Path(folder),
        processor=tokenizer, base="tiny", outputs=outputs, dtype=dtype,
        generation=generation or {"eos_token_id": [3]}, merged=merged, unmerged=lambda: tensors(copy.deepcopy(base)),
        load_base=lambda: copy.deepcopy(base), load_adapted=lambda: load_adapter(copy.deepcopy(base), folder),
        inputs=inputs or {"input_ids": torch.tensor([[5, 6, 7, 8]])}, read_model=read,
    )  # fmt: skip
    return artifact, adapted
