"""How written translations and summaries are judged: sacrebleu, torchmetrics, exact match."""

from collections.abc import Sequence
from importlib.util import find_spec

from lora_ft.errors import UsageError
from lora_ft.records import Judgement, Prediction

from ._text_metrics import judge_text

AUTO = ("exact_match", "bleu", "chrf")
PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge_l": "torchmetrics"}


def require_package(package: str, what: str, fix: str = "") -> None:
    """Raise a UsageError when a package of the extra `text` is missing.

    Args:
        package: as it is imported.
        what: needs it.
        fix: another way out than to install it.
    """
    if find_spec(package) is None:
        install = "pip install 'lora-ft[text]'"
        raise UsageError(f"{what} needs the package {package}", fix=f"{install}, or {fix}" if fix else install)


def require_metrics(metrics: Sequence[str]) -> None:
    """Raise a UsageError when the package of one of these metrics is missing."""
    for name in metrics:
        if name in PACKAGES:
            require_package(PACKAGES[name], f"the metric {name}", "set task.metrics to [exact_match]")


def judge_written(predictions: Sequence[Prediction], metrics: Sequence[str], tokenize: str) -> Judgement:
    """Corpus BLEU and chrF (0 to 100), mean ROUGE-L F (0 to 1), exact match; `right` is the exact match.

    ROUGE-L is that of Google's rouge_score without stemming: it reads a-z and 0-9 only, so text in other scripts
    scores 0.

    Args:
        predictions: those without a reference do not count.
        metrics: of exact_match, bleu, chrf, rouge_l.
        tokenize: sacrebleu's tokenizer for BLEU.
    """
    scored = [p for p in predictions if p.reference is not None]
    exact = judge_text(scored)
    if not scored:
        return exact
    written = [p.output.strip() for p in scored]
    wanted = [(p.reference or "").strip() for p in scored]
    found = dict(exact.metrics) if "exact_match" in metrics else {}
    if "bleu" in metrics:
        from sacrebleu.metrics.bleu import BLEU

        # force: no warning about text that looks tokenized, it is as the user's references are
        found["bleu"] = BLEU(tokenize=tokenize, force=True).corpus_score(written, [wanted]).score
    if "chrf" in metrics:
        from sacrebleu.metrics.chrf import CHRF

        found["chrf"] = CHRF().corpus_score(written, [wanted]).score
    if "rouge_l" in metrics:
        from torchmetrics.functional.text import rouge_score

        scores = rouge_score(written, [[w] for w in wanted], rouge_keys="rougeL")
        found["rouge_l"] = float(scores["rougeL_fmeasure"])
    return Judgement(found, exact.right)
