"""Rows of the demo data, each kind from the same made-up customers' messages; and numbers."""

import json
import random
import re
from dataclasses import dataclass

from demo_texts import (
    BANK_PRODUCTS,
    BANK_TEXTS,
    CALM,
    ENGLISH,
    ENGLISH_TENS,
    GERMAN,
    GERMAN_TENS,
    HELLO,
    MORE_TEXTS,
    NAMES,
    ORDER,
    PRODUCTS,
    QUESTIONS,
    TEXTS,
    UNSEEN,
    URGENT,
)

INTENTS = sorted(TEXTS)
FEATURES = 10
NOISE = 0.05


@dataclass(frozen=True)
class Message:
    """A customer's message and what is in it."""

    text: str
    intent: str
    product: str
    order: str | None
    urgent: bool
    name: str | None


def products(part: str, table: dict[str, str] = PRODUCTS) -> list[str]:
    """What the messages of "train" or "heldout" are about."""
    return [" ".join(p.split()) for p in table[part].split(";")]


def message(part: str, intent: str, rng: random.Random, bodies: list[str], about: list[str]) -> Message:
    """A message with one of the bodies about one of the products."""
    product = rng.choice(about)
    # Order numbers of the two parts end in different digits, so none is in both.
    last = rng.choice("012345" if part == "train" else "6789")
    order = f"{rng.choice('ABCDEFGHKM')}{rng.randrange(1000, 9999)}{last}" if rng.random() < 0.75 else None
    urgent = rng.random() < 0.5
    body = rng.choice(bodies).format(p=product)
    hello = rng.choice(HELLO)
    if not hello:
        body = body[0].upper() + body[1:]
    body += "" if body.endswith("?") else "."
    parts = [hello, body]
    tail = [rng.choice(ORDER).format(o=order)] if order else []
    tail.append(rng.choice(URGENT if urgent else CALM))
    rng.shuffle(tail)
    parts += tail
    name = rng.choice(NAMES[part].split()) if rng.random() < 0.5 else None
    text = " ".join(p for p in (*parts, name) if p)
    return Message(text, intent, product, order, urgent, name)


def support(part: str, count: int, rng: random.Random) -> list[dict]:
    """A message, and the JSON record that a help desk files for it."""
    rows = []
    for i in range(count):
        intent = INTENTS[i % len(INTENTS)]
        m = message(part, intent, rng, TEXTS[intent], products(part))
        record = {"intent": intent, "product": m.product, "order": m.order, "urgent": m.urgent}
        rows.append({"prompt": m.text, "completion": json.dumps(record)})
    return rows


def _messages(part: str, count: int, rng: random.Random) -> list[Message]:
    """With more ways to say it, some of them in held-out rows only."""
    turns = [INTENTS[i % len(INTENTS)] for i in range(count)]
    return [message(part, intent, rng, _bodies(part, intent), products(part)) for intent in turns]


def _bodies(part: str, intent: str) -> list[str]:
    return [*TEXTS[intent], *(MORE_TEXTS[intent] if part == "heldout" else MORE_TEXTS[intent][:-UNSEEN])]


def intents(part: str, count: int, rng: random.Random) -> list[dict]:
    """A message and what the customer wants."""
    return [{"text": m.text, "label": m.intent} for m in _messages(part, count, rng)]


def entities(part: str, count: int, rng: random.Random) -> list[dict]:
    """Words, and BIO tags of products, order numbers and names."""
    return [_tagged(m) for m in _messages(part, count, rng)]


def _tagged(m: Message) -> dict:
    spans = [(m.text.index(m.product), m.product, "PRODUCT")]
    if m.order:
        spans.append((m.text.index(m.order), m.order, "ORDER"))
    if m.name:
        spans.append((len(m.text) - len(m.name), m.name, "PERSON"))
    words = list(re.finditer(r"\w+|[^\w\s]", m.text))
    tags = ["O"] * len(words)
    for start, text, kind in spans:
        inside = [i for i, w in enumerate(words) if start <= w.start() < start + len(text)]
        for i in inside:
            tags[i] = f"{'B' if i == inside[0] else 'I'}-{kind}"
    return {"tokens": [w[0] for w in words], "tags": tags}


def questions(part: str, count: int, rng: random.Random) -> list[dict]:
    """A question about a message, and where its answer stands."""
    rows = []
    for m in _messages(part, count, rng):
        known = {k: v for k, v in (("product", m.product), ("order", m.order), ("name", m.name)) if v}
        asked = rng.choice(sorted(known))
        answer = known[asked]
        start = m.text.rindex(answer) if asked == "name" else m.text.index(answer)
        rows.append(
            {
                "question": rng.choice(QUESTIONS[asked]),
                "context": m.text,
                "answers": {"text": [answer], "answer_start": [start]},
            }
        )
    return rows


def pairs(part: str, count: int, rng: random.Random) -> list[dict]:
    """Two messages of the same intent about the same product in different words; no intent and product twice."""
    both = [(product, intent) for product in products(part) for intent in INTENTS]
    rows = []
    for product, intent in rng.sample(both, count):
        bodies = rng.sample(_bodies(part, intent), 2)
        anchor, positive = (message(part, intent, rng, [body], [product]).text for body in bodies)
        rows.append({"anchor": anchor, "positive": positive})
    return rows


def bank_text(part: str, count: int, rng: random.Random) -> list[dict]:
    """Unlabelled messages to a bank; each says the same thing in two ways."""
    rows = []
    for i in range(count):
        intent = INTENTS[i % len(INTENTS)]
        first, second = rng.sample(BANK_TEXTS[intent], 2)
        about = [rng.choice(products(part, BANK_PRODUCTS))]
        end = "" if first.endswith("?") else "."
        body = f"{first}{end} {second[0].upper()}{second[1:]}"
        rows.append({"text": message(part, intent, rng, [body], about).text})
    return rows


def bank_intents(part: str, count: int, rng: random.Random) -> list[dict]:
    """A message to a bank and what the customer wants."""
    rows = []
    for i in range(count):
        intent = INTENTS[i % len(INTENTS)]
        m = message(part, intent, rng, BANK_TEXTS[intent], products(part, BANK_PRODUCTS))
        rows.append({"text": m.text, "label": intent})
    return rows


def numbers(part: str, count: int, rng: random.Random) -> list[dict]:
    """English and German number words from 1 to 9999; one in ten numbers above 100 is for held-out rows."""
    held = [n for n in range(101, 10_000) if n % 10 == sum(map(int, str(n // 10))) % 10]
    if part == "heldout":
        chosen = rng.sample(held, count)
    else:
        others = sorted(set(range(101, 10_000)) - set(held))
        chosen = [*range(1, 101), *rng.sample(others, count - 100)]
    return [{"source": english(n), "target": german(n)} for n in chosen]


def english(n: int) -> str:
    """1..9999 in British English words: 342 is three hundred and forty-two."""
    if n >= 1000:
        rest = n % 1000
        return f"{ENGLISH[n // 1000]} thousand" + (f"{' and' if rest < 100 else ''} {english(rest)}" if rest else "")
    if n >= 100:
        return f"{ENGLISH[n // 100]} hundred" + (f" and {english(n % 100)}" if n % 100 else "")
    if n < 20:
        return ENGLISH[n]
    return ENGLISH_TENS[n // 10 - 2] + (f"-{ENGLISH[n % 10]}" if n % 10 else "")


def german(n: int) -> str:
    """1..9999 in German words, in one word: 342 is dreihundertzweiundvierzig."""
    if n >= 1000:
        return f"{GERMAN[n // 1000]}tausend" + (german(n % 1000) if n % 1000 else "")
    if n >= 100:
        return f"{GERMAN[n // 100]}hundert" + (german(n % 100) if n % 100 else "")
    if n == 1:
        return "eins"
    if n < 20:
        return GERMAN[n]
    return (f"{GERMAN[n % 10]}und" if n % 10 else "") + GERMAN_TENS[n // 10 - 2]


def ten_features(part: str, count: int, rng: random.Random) -> list[dict]:
    """Ten numbers in [-1, 1], and whether a curved rule of six of them holds; one row in twenty says the opposite."""
    rows = []
    for _ in range(count):
        x = [round(rng.uniform(-1, 1), 2) for _ in range(FEATURES)]
        holds = 2 * x[0] * x[1] + x[2] * x[2] - x[3] + x[4] * abs(x[5]) > 0.3
        rows.append({"inputs": x, "target": int(holds != (rng.random() < NOISE))})
    return rows
