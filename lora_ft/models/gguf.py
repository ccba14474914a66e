"""A .gguf file -> a plain Transformers folder (safetensors, tokenizer, clean config), once, in the cache."""

from pathlib import Path

from lora_ft.errors import ArtifactError


def convert(file: Path, target: Path) -> None:
    """Dequantise `file` to float32 and write it to the empty folder `target`.

    float32 is exact: a 4-bit block's scale times an integer needs more digits than bfloat16 has. Transformers marks a
    model read from GGUF as quantised and refuses to save it, so the weights move into a fresh model of a clean config.

    Raises:
        ArtifactError: not GGUF, or of an architecture that Transformers does not read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with file.open("rb") as head:
        if head.read(4) != b"GGUF":
            raise ArtifactError("this is not a GGUF file", where=str(file))
    try:
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (ValueError, OSError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise ArtifactError(
            f"Transformers cannot read this GGUF file: {str(error).splitlines()[0]}",
            where=str(file),
            fix="use the model's safetensors version (a hub id or a local folder)",
        ) from error
    config = type(model.config).from_dict(
        {
            k: v
            for k, v in model.config.to_dict().items()
            if k not in ("quantization_config", "_name_or_path", "_model_name_or_path")
        }
    )
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    # Buffers that are computed, not stored (rotary frequencies), stay on the meta device; they are not saved either.
    if model.generation_config is not None:
        plain.generation_config = model.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
