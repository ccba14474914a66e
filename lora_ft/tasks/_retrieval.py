"""Which texts are right answers to which, and whether they are found."""

import torch
from torch import Tensor

RANKED_TOGETHER = 1024  # anchors compared with all held-out positives at once, for recall


def same(a: Tensor, b: Tensor) -> Tensor:
    """(N, 2), (M, 2) -> (N, M) whether the texts are the same."""
    return (a[:, None] == b[None]).all(-1)


def joined(a: Tensor, b: Tensor) -> Tensor:
    """(N, M), (M, K) -> (N, K) whether some m has both."""
    return (a.float() @ b.float()) > 0


def recall(texts: Tensor, marks: Tensor) -> tuple[dict[str, float], list[bool]]:
    """Recall at 1, 5 and 10, and for each row whether its positive is the nearest.

    Args:
        texts: (N, 3, D) anchors, positives and negatives.
        marks: (N, 3, 2) of these; equal positives are one candidate.
    """
    from sklearn.metrics import accuracy_score, top_k_accuracy_score

    distinct, place = torch.unique(marks[:, 1], dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(place)).scatter_reduce(0, place, torch.arange(len(place)), "amin")
    candidates = texts[first, 1]
    nearest: list[Tensor] = []
    hits = {5: 0.0, 10: 0.0}
    for start in range(0, len(texts), RANKED_TOGETHER):
        rows = slice(start, start + RANKED_TOGETHER)
        wanted = place[rows, None]
        scores = texts[rows, 0] @ candidates.T
        own = scores.gather(1, wanted)
        row, other = same(marks[rows, 0], marks[:, 0]).nonzero(as_tuple=True)
        scores[row, place[other]] = float(scores.min()) - 1.0  # right too, if not asked for in this row
        scores.scatter_(1, wanted, own)
        nearest.append(scores.argmax(-1))
        for k in hits:
            among = {"k": k, "normalize": False, "labels": range(len(distinct))}
            all_found = len(distinct) <= k
            hits[k] += len(own) if all_found else top_k_accuracy_score(wanted[:, 0].numpy(), scores.numpy(), **among)
    best = torch.cat(nearest)
    metrics = {"recall_at_1": float(accuracy_score(place.numpy(), best.numpy()))}
    metrics |= {f"recall_at_{k}": found / len(place) for k, found in hits.items()}
    return metrics, (best == place).tolist()
