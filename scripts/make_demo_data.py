"""Write the demo data: customers' support messages, and the JSON record that a help desk files for each.

Held-out rows use products, order numbers and customer names that no training row has, so a model that has only
memorised fails them. Run `python scripts/make_demo_data.py`; the files are the same every time.
"""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "lora_ft" / "data" / "builtin"
ROWS = {"support-train": 480, "support-heldout": 120}

PRODUCTS = {
    "support-train": """desk lamp; coffee grinder; winter jacket; rain boots; yoga mat; electric kettle; phone case;
        office chair; garden hose; wool blanket; running shoes; bluetooth speaker; water filter; bread knife; picture
        frame; hair dryer; travel backpack; wall clock; baby monitor; cutting board; bike helmet; camping stove; table
        fan; reading glasses; laptop stand; swim goggles; rice cooker; door mat; alarm clock; tool box; sun hat; dog
        bed; fish tank; paint roller; cheese grater; ski gloves; sleeping bag; guitar strap; pepper mill; step ladder;
        power drill; shower curtain; toaster oven; hiking poles; gaming mouse; leather wallet; plant pot; kitchen
        scale""",
    "support-heldout": """air fryer; tennis racket; denim shirt; usb hub; cast iron pan; hand mixer; bath towel; piano
        bench; snow shovel; pocket radio; linen trousers; steam iron; pool cue; night light; tea infuser; mountain
        bike; label printer; silk scarf; wine rack; ear muffs""",
}
NAMES = {
    "support-train": "Ana Ben Carla Dmitri Elena Farid Grace Hugo Ines Jonas Kira Liam Mona Nils Olga Pavel Rosa Sven",
    "support-heldout": "Tariq Uma Viktor Wanda Xavier Yusuf Zoe Amara Bruno Chloe",
}
TEXTS = {
    "refund": [
        "I sent the {p} back two weeks ago and still have no money on my account",
        "please give me my money back for the {p}",
        "The {p} is not what I expected. How do I get refunded?",
        "you charged me twice for the {p}, I want one payment returned",
        "I want a refund for the {p}",
    ],
    "exchange": [
        "the {p} is the wrong size, can I swap it for a larger one?",
        "I got the {p} in blue but wanted green. Can you change it?",
        "Could you exchange the {p} for another model?",
        "I would like to trade the {p} for a different colour",
        "you sent the wrong {p}, please send the right one instead",
    ],
    "delivery": [
        "where is my {p}? The tracking page has not moved for days",
        "the {p} should have arrived on Monday but nothing came",
        "The courier says the {p} was delivered, I never got it",
        "when will the {p} get here?",
        "my parcel with the {p} seems to be lost",
    ],
    "defect": [
        "the {p} broke after one day",
        "The {p} I received does not work at all",
        "there is a big crack in the {p}",
        "the {p} stopped working this morning",
        "a part of the {p} is missing, so I cannot use it",
    ],
    "cancel": [
        "please cancel the {p}, I no longer need it",
        "I ordered the {p} by mistake, stop the order",
        "Can I still call off the {p} before it ships?",
        "do not send the {p}, I found one elsewhere",
        "I changed my mind about the {p} and want to cancel",
    ],
    "invoice": [
        "I need an invoice for the {p} for my tax office",
        "The bill for the {p} shows the wrong address",
        "can you send me the receipt for the {p}?",
        "my accountant asks for a VAT invoice of the {p}",
        "there was no bill in the box with the {p}",
    ],
}
ORDER = ["Order {o}.", "My order number is {o}.", "({o})", "It is about order {o}.", "Ref {o}."]
URGENT = ["This is urgent!", "I need it by tomorrow.", "Please hurry.", "I need an answer today."]
CALM = ["No rush.", "Take your time.", "Thanks in advance.", "Have a nice day.", ""]
HELLO = ["Hi,", "Hello,", "Good morning,", "Dear team,", "", ""]


def row(split: str, intent: str, rng: random.Random) -> dict[str, str]:
    """One message and its record."""
    product = rng.choice([" ".join(p.split()) for p in PRODUCTS[split].split(";")])
    # Order numbers of the two splits end in different digits, so none is in both.
    last = rng.choice("012345" if split == "support-train" else "6789")
    order = f"{rng.choice('ABCDEFGHKM')}{rng.randrange(1000, 9999)}{last}" if rng.random() < 0.75 else None
    urgent = rng.random() < 0.5
    body = rng.choice(TEXTS[intent]).format(p=product)
    hello = rng.choice(HELLO)
    if not hello:
        body = body[0].upper() + body[1:]
    body += "" if body.endswith("?") else "."
    parts = [hello, body]
    tail = [rng.choice(ORDER).format(o=order)] if order else []
    tail.append(rng.choice(URGENT if urgent else CALM))
    rng.shuffle(tail)
    parts += tail
    if rng.random() < 0.5:
        parts.append(rng.choice(NAMES[split].split()))
    record = {"intent": intent, "product": product, "order": order, "urgent": urgent}
    return {"prompt": " ".join(p for p in parts if p), "completion": json.dumps(record)}


def main() -> None:
    """Write both files."""
    for split, count in ROWS.items():
        rng = random.Random(split)
        intents = sorted(TEXTS)
        rows = [row(split, intents[i % len(intents)], rng) for i in range(count)]
        rng.shuffle(rows)
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (FOLDER / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
