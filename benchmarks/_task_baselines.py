"""What a linear model on counted words reaches on the rows of `_task_data`: the figure that an encoder has to beat.

Each function takes the training and the held-out rows and gives one prediction a held-out row, so that the baseline
and the model are scored by the same code. Settings are chosen by cross-validation on the training rows alone.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
SEED = 4
FOLDS = 3
CLASSIFIER_C = (1.0, 3.0, 10.0, 30.0)
TAGGER_C = (0.3, 1.0, 3.0, 10.0)
RIDGE_ALPHA = (0.3, 1.0, 3.0, 10.0)
AFFIX = 4  # longest prefix and suffix of a word that the tagger sees


def classify(train: Sequence[Row], held_out: Sequence[Row]) -> list[str]:
    """The class of each held-out text: TF-IDF of words and letters, logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    search = GridSearchCV(
        _on_words(LogisticRegression(max_iter=2000)),
        {"model__C": CLASSIFIER_C},
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=SEED),
    )
    search.fit([row["text"] for row in train], [row["label"] for row in train])
    return [str(label) for label in search.predict([row["text"] for row in held_out])]


def regress(train: Sequence[Row], held_out: Sequence[Row]) -> list[float]:
    """The value of each held-out text: TF-IDF of words and letters, ridge regression."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, KFold

    search = GridSearchCV(
        _on_words(Ridge()),
        {"model__alpha": RIDGE_ALPHA},
        cv=KFold(FOLDS, shuffle=True, random_state=SEED),
        scoring="neg_mean_squared_error",
    )
    search.fit([row["text"] for row in train], [row["label"] for row in train])
    return [float(value) for value in search.predict([row["text"] for row in held_out])]


def most_frequent_tags(train: Sequence[Row], held_out: Sequence[Row]) -> list[list[str]]:
    """Each word's most frequent tag in the training rows; for an unknown word the most frequent of all."""
    by_word: dict[str, Counter[str]] = {}
    for row in train:
        for token, tag in zip(row["tokens"], row["tags"], strict=True):
            by_word.setdefault(token.lower(), Counter())[tag] += 1
    usual = sum(by_word.values(), Counter()).most_common(1)[0][0]
    best = {word: tags.most_common(1)[0][0] for word, tags in by_word.items()}
    return [[best.get(token.lower(), usual) for token in row["tokens"]] for row in held_out]


def tag(train: Sequence[Row], held_out: Sequence[Row]) -> list[list[str]]:
    """Each token's tag: logistic regression on the word, its shape and affixes, and those of two words to each side."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import Pipeline

    features = [_token_features(row["tokens"], i) for row in train for i in range(len(row["tokens"]))]
    tags = [tag for row in train for tag in row["tags"]]
    sentences = [number for number, row in enumerate(train) for _ in row["tokens"]]
    model = Pipeline([("features", DictVectorizer()), ("model", LogisticRegression(max_iter=1000))])
    # The share of "no entity" hides the rare tags from accuracy; the log-likelihood sees them.
    search = GridSearchCV(
        model, {"model__C": TAGGER_C}, cv=GroupKFold(FOLDS, shuffle=True, random_state=SEED), scoring=_log_likelihood
    )
    search.fit(features, tags, groups=sentences)
    found = iter(
        search.predict([_token_features(row["tokens"], i) for row in held_out for i in range(len(row["tokens"]))])
    )
    return [[str(next(found)) for _ in row["tokens"]] for row in held_out]


def similarity(train: Sequence[Row], held_out: Sequence[Row]) -> Any:
    """Cosine of the TF-IDF vectors of every held-out anchor (rows) and every held-out positive (columns).

    The words' weights come from the training pairs. A pair's own positive is on the diagonal.
    """
    words = _words().fit([row[side] for row in train for side in ("anchor", "positive")])
    anchors = words.transform([row["anchor"] for row in held_out])
    positives = words.transform([row["positive"] for row in held_out])
    return (anchors @ positives.T).toarray() / len(words.transformer_list)


def _words() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion

    return FeatureUnion(
        [
            ("words", TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b|[^\w\s]+", sublinear_tf=True)),
            ("letters", TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True)),
        ]
    )


def _on_words(model: Any) -> Any:
    from sklearn.pipeline import Pipeline

    return Pipeline([("features", _words()), ("model", model)])


def _log_likelihood(model: Any, rows: Any, tags: Sequence[str]) -> float:
    """Mean log-probability of the true tags; a tag that the fold's model never saw counts as very unlikely."""
    import numpy as np

    column = {label: i for i, label in enumerate(model.classes_)}
    likely = model.predict_proba(rows)
    given = [likely[i, column[tag]] if tag in column else 0.0 for i, tag in enumerate(tags)]
    return float(np.log(np.clip(given, 1e-6, 1)).mean())


def _token_features(tokens: Sequence[str], at: int) -> dict[str, float]:
    found: dict[str, float] = {"bias": 1.0}
    for offset in (-2, -1, 0, 1, 2):
        word = tokens[at + offset] if 0 <= at + offset < len(tokens) else ""
        found[f"{offset} word={word.lower()}"] = 1.0
        found[f"{offset} shape={_shape(word)}"] = 1.0
        if abs(offset) <= 1:
            for size in range(1, min(AFFIX, len(word)) + 1):
                found[f"{offset} starts={word[:size].lower()}"] = 1.0
                found[f"{offset} ends={word[-size:].lower()}"] = 1.0
    return found


def _shape(word: str) -> str:
    """`Xx` for Paris, `dd` for 2010, `@x` for @name: runs of one kind of letter are shortened to two."""
    kinds = ["X" if c.isupper() else "x" if c.islower() else "d" if c.isdigit() else c for c in word]
    return "".join(kind for i, kind in enumerate(kinds) if kinds[max(0, i - 2) : i].count(kind) < 2)
