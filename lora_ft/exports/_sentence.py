"""What sentence-transformers reads beside a model: how token vectors become a sentence's, and prefixes of texts.

Layout as of its versions 2 to 6 (modules.json, 1_Pooling/config.json, config_sentence_transformers.json).
"""

import json
from pathlib import Path
from typing import Any

KINDS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
OTHERS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")


def write_sentence_layout(folder: Path, options: Any, width: int) -> None:
    """Write the three files into a model's folder; without them sentence-transformers takes the mean, unscaled.

    Args:
        folder: with the model.
        options: of the task: pooling, normalize, query_prefix, passage_prefix.
        width: of a token's vector.
    """
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] * bool(options.normalize))]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(steps)
    ]
    pooling = {key: kind == options.pooling for kind, key in KINDS.items()} | dict.fromkeys(OTHERS, False)
    for path, _ in steps[1:]:
        (folder / path).mkdir()
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **pooling, "include_prompt": True})
    prompts = {"query": options.query_prefix, "document": options.passage_prefix}
    about = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(folder / "config_sentence_transformers.json", about)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
