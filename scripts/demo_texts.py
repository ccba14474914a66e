"""The words that the demo data is made of."""

PRODUCTS = {
    "train": """desk lamp; coffee grinder; winter jacket; rain boots; yoga mat; electric kettle; phone case;
        office chair; garden hose; wool blanket; running shoes; bluetooth speaker; water filter; bread knife; picture
        frame; hair dryer; travel backpack; wall clock; baby monitor; cutting board; bike helmet; camping stove; table
        fan; reading glasses; laptop stand; swim goggles; rice cooker; door mat; alarm clock; tool box; sun hat; dog
        bed; fish tank; paint roller; cheese grater; ski gloves; sleeping bag; guitar strap; pepper mill; step ladder;
        power drill; shower curtain; toaster oven; hiking poles; gaming mouse; leather wallet; plant pot; kitchen
        scale""",
    "heldout": """air fryer; tennis racket; denim shirt; usb hub; cast iron pan; hand mixer; bath towel; piano
        bench; snow shovel; pocket radio; linen trousers; steam iron; pool cue; night light; tea infuser; mountain
        bike; label printer; silk scarf; wine rack; ear muffs""",
}
NAMES = {
    "train": "Ana Ben Carla Dmitri Elena Farid Grace Hugo Ines Jonas Kira Liam Mona Nils Olga Pavel Rosa Sven",
    "heldout": "Tariq Uma Viktor Wanda Xavier Yusuf Zoe Amara Bruno Chloe",
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

# Further ways to say it, for the data sets that came later; the last three of each are said in held-out rows only.
MORE_TEXTS = {
    "refund": [
        "kindly transfer the price of the {p} back to my bank account",
        "I returned the {p}, when do I see my money?",
        "you still owe me the price of the {p}",
        "the price of the {p} was taken twice, please pay it back",
        "how long does a refund for the {p} take?",
        "I am waiting for the money that I paid for the {p}",
        "please return what I paid for the {p}",
    ],
    "exchange": [
        "the {p} is too small, I need a bigger size",
        "is it possible to get the {p} in another colour?",
        "I ordered the wrong size of the {p} and would like to swap it",
        "you sent me a different model of the {p} than I ordered, please change it",
        "I would rather have the {p} in black, can we swap?",
        "may I exchange the {p} for a smaller size?",
        "the colour of the {p} is not the one I chose, please send another one",
    ],
    "delivery": [
        "I am still waiting for the {p}, it should be here by now",
        "can you tell me when the {p} arrives?",
        "the tracking number of the {p} does not work",
        "my neighbours have no parcel either, so where did the {p} go?",
        "the {p} is a week late",
        "has the {p} been shipped yet?",
        "the courier never came with the {p}",
    ],
    "defect": [
        "the {p} was damaged when I opened the box",
        "the {p} makes a strange noise and does not work properly",
        "a screw fell out of the {p} and now it is broken",
        "the {p} is faulty",
        "the {p} arrived with a crack and a missing part",
        "my {p} no longer works",
        "the {p} fell apart when I first used it",
    ],
    "cancel": [
        "please do not ship the {p}, I do not want it any more",
        "I want to cancel my order of the {p}",
        "stop the {p}, it was ordered twice by mistake",
        "is it too late to cancel the {p}?",
        "I no longer want the {p}, please stop it",
        "kindly withdraw my order for the {p}",
        "the {p} is not needed any more, please call it off",
    ],
    "invoice": [
        "where can I download the invoice for the {p}?",
        "please send a bill for the {p} with my company's address",
        "I lost the receipt of the {p}, may I have a copy?",
        "the VAT number is missing on the bill of the {p}",
        "the tax office wants to see a receipt for the {p}",
        "could I get the invoice of the {p} by e-mail?",
        "please correct the name on the invoice for the {p}",
    ],
}
UNSEEN = 3

# The same intents at a bank.
BANK_PRODUCTS = {
    "train": """debit card; savings account; money transfer; standing order; credit card; overdraft; travel card;
        business account; joint account; direct debit; student loan; mobile wallet; cash machine withdrawal; foreign
        payment; car loan; prepaid card""",
    "heldout": """gold card; youth account; wire transfer; instalment loan; contactless wristband; deposit account; home
        loan; currency account""",
}
BANK_TEXTS = {
    "refund": [
        "reverse the charge on my {p}, I want my money back",
        "there is a fee on the {p} that I never agreed to, credit it to me",
        "I dispute the amount debited for the {p}",
        "the {p} was debited twice, book one amount back",
        "when is the chargeback for the {p} credited?",
        "please reimburse the interest on my {p}",
    ],
    "exchange": [
        "I want to switch my {p} to the premium one",
        "can I swap the {p} for a different plan?",
        "please upgrade my {p} to another tariff",
        "convert the {p} into one with a lower rate",
        "you opened the wrong kind of {p}, please change it",
        "I would like the {p} with another design instead",
    ],
    "delivery": [
        "my new {p} has not come by post yet",
        "the {p} is still pending after five working days",
        "when will the {p} be in my letterbox?",
        "I was promised the {p} last week and have nothing so far",
        "the {p} was dispatched, but it never reached me",
        "how long until the {p} is processed?",
    ],
    "defect": [
        "the {p} was declined at the till although there is enough on it",
        "the app shows an error when I open the {p}",
        "the chip of the {p} cannot be read",
        "I am locked out of the {p}, the PIN does not work",
        "the {p} has been blocked since this morning",
        "the {p} freezes at the login page",
    ],
    "cancel": [
        "please close the {p} at the end of the month",
        "I want to terminate the {p}",
        "revoke the {p}, I signed it by mistake",
        "stop the {p} before it is executed",
        "I no longer need the {p}, please close it",
        "how do I give notice for the {p}?",
    ],
    "invoice": [
        "I need a statement of the {p} for my tax return",
        "please send the yearly certificate for the {p}",
        "the statement of the {p} shows my old address",
        "where can I download the records of the {p}?",
        "my accountant asks for a written confirmation of the {p}",
        "there is no statement for the {p} in my inbox",
    ],
}
QUESTIONS = {
    "product": ["Which product is it about?", "What did the customer order?", "What is the message about?"],
    "order": ["What is the order number?", "Which order is meant?", "What number does the order have?"],
    "name": ["Who wrote the message?", "What is the customer's name?", "Who is the customer?"],
}
ENGLISH = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
ENGLISH_TENS = [
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
]  # fmt: skip
GERMAN = [
    "null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf",
    "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn",
]  # fmt: skip
GERMAN_TENS = [
    "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig",
]  # fmt: skip
