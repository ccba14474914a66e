"""Write the demo data: customers' support messages in the form of each task; bank customers' messages; and numbers.

Held-out rows use products, order numbers and customer names that no training row has, so a model that has only
memorised fails them. Run `python scripts/make_demo_data.py`; the files are the same every time.

    support-*        a message, and the JSON record that a help desk files for it
    intents-*        a message and what the customer wants
    entities-*       its words, and tags of products, order numbers and names
    questions-*      a question about it, and where the answer stands
    support-pairs-*  two messages that want the same
    domain-*         messages to a bank, which want the same in other words: unlabelled text, labelled held-out rows
    numbers-*        English and German number words
    ten-features-*   ten numbers and a class
"""

import json
import random
from pathlib import Path

import demo_rows as rows

FOLDER = Path(__file__).parent.parent / "lora_ft" / "data" / "builtin"
# File: rows, what makes them, and of which part.
FILES = {
    "support-train": (480, rows.support, "train"),
    "support-heldout": (120, rows.support, "heldout"),
    "intents-train": (480, rows.intents, "train"),
    "intents-heldout": (180, rows.intents, "heldout"),
    "entities-train": (360, rows.entities, "train"),
    "entities-heldout": (120, rows.entities, "heldout"),
    "questions-train": (480, rows.questions, "train"),
    "questions-heldout": (120, rows.questions, "heldout"),
    "support-pairs-train": (288, rows.pairs, "train"),
    "support-pairs-heldout": (120, rows.pairs, "heldout"),
    "domain-text": (480, rows.bank_text, "train"),
    "domain-heldout": (180, rows.bank_intents, "heldout"),
    "numbers-train": (1000, rows.numbers, "train"),
    "numbers-heldout": (120, rows.numbers, "heldout"),
    "ten-features-train": (1000, rows.ten_features, "train"),
    "ten-features-heldout": (250, rows.ten_features, "heldout"),
}
ROWS = {name: count for name, (count, _, _) in FILES.items()}


def main() -> None:
    """Write all files."""
    for name, (count, make, part) in FILES.items():
        rng = random.Random(name)
        made = make(part, count, rng)
        rng.shuffle(made)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
