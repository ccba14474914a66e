"""An adapter folder that vLLM takes (https://docs.vllm.ai/en/latest/features/lora.html): plain PEFT layout."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports._plain_lora import CONVERT, check_linear, check_original, check_plain_lora, factors, one_rank
from lora_ft.exports.probe_file import OWN_FILES
from lora_ft.exports.publish import check_same, differences
from lora_ft.registry import EXPORTS
from lora_ft_adapters import AdapterError, load_adapter
from lora_ft_adapters.weights import TensorFolder

PROGRAM = "vLLM"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
PREFIX = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PACKED = ("experts",)


class VllmFormat:
    """Every layer with A and B of one rank, the scaling alpha / r = 1, and nothing that vLLM refuses."""

    name = "vllm"
    description = "The LoRA as vLLM takes it: one rank, plain scaling, no head, no new tokens."
    full_precision = False
    dtypes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("vllm",)

    def default_dtype(self, stored: str) -> str:
        """There is no choice."""
        return ""

    def check(self, subject: Subject) -> None:
        """A plain LoRA of rank 512 at most on linear layers inside the blocks."""
        check_plain_lora(subject, PROGRAM)
        check_original(subject, PROGRAM)
        if subject.auto_class is None or subject.task not in ("causal-lm", "image-text-to-text"):
            raise UsageError(f"{PROGRAM} puts LoRA on models that write text, and this is a {subject.task} adapter")
        config = subject.adapter
        highest = max([config.r, *(config.rank_pattern or {}).values()])
        if highest > RANKS[-1]:
            raise UsageError(
                f"{PROGRAM} takes ranks up to {RANKS[-1]}, and this adapter has {highest}",
                fix=f"lora-ft compress RUN --rank {RANKS[-1]} --out DIR, or --format merged",
            )
        names = check_linear(subject, PROGRAM)
        _check_writes(subject, names)
        for name in names:
            if name.endswith(("lm_head", "embed_tokens")):
                raise UsageError(f"{PROGRAM} takes no LoRA on {name}", fix="leave it out of target_modules")
            if any(part in name.split(".") for part in PACKED):
                raise UsageError(f"{PROGRAM} takes no LoRA on the experts ({name})", fix="--format merged")
            if type(subject.model.get_submodule(name)).__name__ == "Conv1D":
                raise UsageError(f"{PROGRAM} takes no LoRA on the Conv1D layers of this model ({name})", fix=CONVERT)

    def write(self, artifact: Artifact, folder: Path) -> None:
        """The two files, and the tokenizer's."""
        found = one_rank(factors(artifact.load_adapted()))
        rank = next(iter(found.values()))[0].shape[0]
        tensors = {}
        for name, (a, b) in found.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": artifact.base,
            "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
            "target_modules": sorted({n.rsplit(".", 1)[-1] for n in found}),
        }  # fmt: skip
        whole = {n.rsplit(".", 1)[-1] for n in found}
        others = [n for n, _ in artifact.subject.model.named_modules() if n.rsplit(".", 1)[-1] in whole]
        if set(others) != set(found):  # the last parts of the names would hit more layers
            config["target_modules"] = sorted(found)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in artifact.folder.iterdir():
            if path.is_file() and path.name not in (*OWN_FILES, TENSORS, CONFIG):
                shutil.copyfile(path, folder / path.name)

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """The rules once more on what was written, and stock PEFT under another name."""
        problem = problem_of(folder)
        if problem:
            raise ArtifactError(f"{PROGRAM} would refuse this adapter: {problem}", where=str(folder))
        try:
            model = load_adapter(artifact.load_base(), folder, "served")
        except AdapterError as error:
            raise ArtifactError(str(error), where=str(folder)) from error
        figures = differences(model, probes, artifact.outputs)
        check_same(figures, model, TENSORS)
        return figures


def problem_of(folder: Path) -> str:
    """What in an adapter's files breaks vLLM's rules, as its LoRAModel and PEFTHelper check them; "" for nothing."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("use_dora") or config.get("modules_to_save") or config.get("bias", "none") != "none":
        return "DoRA, modules_to_save or bias"
    rank = config["r"]
    if rank > RANKS[-1]:
        return f"rank {rank} is above {RANKS[-1]}"
    tensors = TensorFolder(folder)
    targets = config["target_modules"]
    for name in tensors:
        parts = name.rsplit(".", 2)
        if (
            not name.startswith(PREFIX)
            or len(parts) != 3
            or parts[1] not in ("lora_A", "lora_B")
            or parts[2] != "weight"
        ):
            return f"the tensor {name} is not of a LoRA layer"
        module = parts[0].removeprefix(PREFIX)
        if module not in targets and module.rsplit(".", 1)[-1] not in targets:
            return f"{module} is not in target_modules"
        shape = tensors.shape(name)
        if shape[0 if parts[1] == "lora_A" else 1] != rank:
            return f"{name} has shape {shape}, and r is {rank}"
        if f"{parts[0]}.{'lora_B' if parts[1] == 'lora_A' else 'lora_A'}.weight" not in tensors:
            return f"{parts[0]} has one matrix alone"
    return ""


def _check_writes(subject: Subject, names: Sequence[str]) -> None:
    """Refuse layers that are not of the part that writes: vLLM leaves them out, with a warning in its log."""
    decoder = getattr(subject.model, "get_decoder", lambda: None)()
    inside = next((n for n, m in subject.model.named_modules() if m is decoder), "")
    odd = [n for n in names if inside and not n.startswith(f"{inside}.") and not n.endswith("lm_head")]
    if odd:
        raise UsageError(
            f"{PROGRAM} takes LoRA on the language model alone, and {odd[0]} is not in it",
            fix=f"target_modules with {inside}.*, or --format merged",
        )


EXPORTS.register(VllmFormat())
