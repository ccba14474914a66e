"""Speech to text with a model that gives a letter, or none, for every 20 ms (wav2vec 2.0): Graves et al. 2006."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_ft.errors import UsageError
from lora_ft.records import Batch, EncodeOptions, Example, LossSum, Sample
from lora_ft.registry import TASKS

from ._audio import FRAME, Heard, features, short, sound_answer
from ._base import IGNORE
from ._decoder import plain_model
from ._speech import Speech, SpeechOptions, text_of

MOST_NAMED = 8  # unknown letters in a message


class CTCOptions(SpeechOptions):
    """Options of speech-recognition-ctc."""

    case: Literal["auto", "keep", "lower", "upper"] = Field(
        "auto", description="Letters of the texts for the tokenizer; auto: the only case that it has."
    )
    unknown_letters: Literal["error", "drop"] = Field(
        "error", description="Letters, digits and marks of a text that the tokenizer does not have."
    )
    ctc_zero_infinity: bool = Field(
        False, description="Leave out rows whose loss is infinite; texts too long for their sound are refused before."
    )


@dataclass(frozen=True)
class SpeechRecognitionCTC(Speech):
    """The loss of a row is that of its text divided by the letters in it, and a step's is the mean over rows."""

    options: CTCOptions = field(default_factory=CTCOptions)

    name = "speech-recognition-ctc"
    hub_task = "automatic-speech-recognition"
    description = "Speech to text with a model that gives a letter for every moment of sound, such as wav2vec 2.0."
    auto_class = "AutoModelForCTC"

    def model_arguments(self) -> dict[str, Any]:
        """As PyTorch means the mean: per letter of a row, then over rows."""
        return {
            **super().model_arguments(), "ctc_loss_reduction": "mean",
            "ctc_zero_infinity": self.options.ctc_zero_infinity,
        }  # fmt: skip

    def check_processor(self, processor: Any) -> list[str]:
        """Refuse a tokenizer without padding, which is the blank."""
        super().check_processor(processor)
        if processor.tokenizer.pad_token_id is None:
            raise UsageError("the tokenizer has no padding token, and that is CTC's blank")
        return []

    def text_ids(self, processor: Any, text: str) -> list[int]:
        """One id for each letter, in the case that the tokenizer has."""
        tokenizer = processor.tokenizer
        text = self._cased(tokenizer, text)
        unknown = _unknown(tokenizer, text)
        if unknown and self.options.unknown_letters == "error":
            names = " ".join(unknown[:MOST_NAMED]) + (" ..." if len(unknown) > MOST_NAMED else "")
            raise ValueError(
                f"the model's tokenizer does not have {names}; task.unknown_letters: drop leaves them out, or mend the "
                "texts"
            )
        text = " ".join("".join(c for c in text if c not in unknown).split())
        ids = list(tokenizer(text)["input_ids"]) if text else []
        if not ids:
            raise ValueError("the text has no letter that the model's tokenizer has")
        return ids

    def spelled(self, processor: Any, ids: Sequence[int], plain: bool) -> str:
        """Letters as they are: twice the same one stays twice."""
        return str(processor.tokenizer.decode(ids, skip_special_tokens=plain, group_tokens=False))

    def check_text(self, ids: Sequence[int], heard: Heard, options: EncodeOptions) -> str:
        """Each letter takes a frame of its own, and one more parts it from the same letter before it."""
        needed = len(ids) + sum(a == b for a, b in pairwise(ids))
        frames = (heard.samples - FRAME // 4) // FRAME
        if needed > frames:
            raise ValueError(
                f"{heard.media.shown}: a text of {len(ids)} letters needs {needed} frames of sound, there are {frames} "
                "(50 in a second): the text is not that of the sound, or the sound is cut"
            )
        return f"text longer than {options.max_length} letters" if len(ids) > options.max_length else ""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """CTC in float32; the sum over rows of loss / letters, as Transformers' own with ctc_loss_reduction mean."""
        labels = batch["labels"]
        config = plain_model(model).config
        logits = self.answer(model, batch).logits.float()
        if int(labels.max()) >= logits.shape[-1]:
            raise UsageError(
                f"the tokenizer has ids up to {int(labels.max())}, the model {logits.shape[-1]} outputs",
                why="tokenizer and model do not belong together",
            )
        wanted = labels != IGNORE
        letters = wanted.sum(-1)
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's CTC is not deterministic
            losses = nn.functional.ctc_loss(
                logits.log_softmax(-1).transpose(0, 1), labels[wanted], self._frames(model, batch), letters,
                blank=config.pad_token_id, reduction="none", zero_infinity=self.options.ctc_zero_infinity,
            )  # fmt: skip
        return LossSum((losses / letters).sum(), len(labels))

    def answer(self, model: nn.Module, batch: Batch) -> Any:
        """Logits (B, frames, letters)."""
        return sound_answer(model, {k: v for k, v in batch.items() if k != "labels"})

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """The first second of each sound."""
        return [features([short(s, processor)], processor, self.options.augment, 0) for s in samples]

    def write(self, model: nn.Module, processor: Any, batch: Batch, most: int) -> list[list[int]]:
        """The likeliest letter of each frame, repeats merged, then blanks dropped: in this order "oo" stays "oo"."""
        blank, padding = plain_model(model).config.pad_token_id, processor.tokenizer.pad_token_id
        if blank != padding:
            raise UsageError(f"the model's blank is {blank}, the tokenizer's padding, which should be it, {padding}")
        with torch.inference_mode():
            best = self.answer(model, batch).logits.argmax(-1)
        rows = [row[:n].unique_consecutive() for row, n in zip(best, self._frames(model, batch).tolist(), strict=True)]
        return [row[row != blank].tolist() for row in rows]

    def reference_lengths(self, processor: Any, examples: Sequence[Example]) -> list[int | None]:
        """One pass gives all letters, so that every row with a text is worth judging."""
        return [None if text_of(e) is None else 1 for e in examples]

    def _frames(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) of the frames that are no padding."""
        heard = batch["attention_mask"].sum(-1)
        frames: Tensor = plain_model(model)._get_feat_extract_output_lengths(heard).to(torch.long)
        return frames

    def _cased(self, tokenizer: Any, text: str) -> str:
        case: str = self.options.case
        if case == "auto":
            letters = [t for t in tokenizer.get_vocab() if len(t) == 1 and t.lower() != t.upper()]
            cases = {c for c in ("lower", "upper") for t in letters if t == getattr(t, c)()}
            case = cases.pop() if len(cases) == 1 else "keep"
        return text if case == "keep" else str(getattr(text, case)())


def _unknown(tokenizer: Any, text: str) -> list[str]:
    """The letters of a text that become the unknown token."""
    if tokenizer.unk_token_id is None:
        return []
    return sorted(c for c in set(text) - {" "} if tokenizer.unk_token_id in tokenizer(c)["input_ids"])


TASKS.register(SpeechRecognitionCTC())
