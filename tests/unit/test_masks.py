"""The supervised text is exactly what the assistant wrote, with its end token."""

import pytest

from lora_ft.data._conversation import check_messages
from lora_ft.records import EncodeOptions, Example
from lora_ft.tasks.causal_lm import CausalLM
from tests.tiny import CHATML, GEMMA, LLAMA3, REASONING, tiny_tokenizer

TALK = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello! How are you?"},
    {"role": "user", "content": "Fine."},
    {"role": "assistant", "content": "Good.\nBye"},
]


def supervised(tokenizer, fields, **options) -> list[str]:
    """The runs of supervised text of all samples of one example."""
    encoded = CausalLM().encoder(tokenizer, EncodeOptions(**options))(Example(fields, "row 1"))
    found = []
    for sample in encoded.samples:
        run: list[int] = []
        for label in [*sample.inputs["labels"], -100]:
            if label != -100:
                run.append(label)
            elif run:
                found.append(tokenizer.decode(run))
                run = []
    return found


@pytest.mark.parametrize(
    ("template", "eos", "end"),
    [(CHATML, "<|im_end|>", "<|im_end|>"), (LLAMA3, "<|eot_id|>", "<|eot_id|>"), (GEMMA, "</s>", "<end_of_turn>")],
    ids=["chatml", "llama3", "gemma"],
)
def test_every_assistant_turn_and_nothing_else_is_supervised(template, eos, end):
    tokenizer = tiny_tokenizer(template, eos)
    assert supervised(tokenizer, {"messages": TALK}) == [f"Hello! How are you?{end}", f"Good.\nBye{end}"]


def test_a_system_prompt_for_a_template_without_system_role_joins_the_first_user_turn():
    tokenizer = tiny_tokenizer(GEMMA, "</s>")
    encoder = CausalLM().encoder(tokenizer, EncodeOptions(system_prompt="Be brief."))
    (sample,) = encoder(Example({"messages": TALK}, "row 1")).samples
    text = tokenizer.decode(sample.inputs["input_ids"])
    assert "<start_of_turn>user\nBe brief.\n\nHi there<end_of_turn>" in text
    assert supervised(tokenizer, {"messages": TALK}, system_prompt="Be brief.")[0] == "Hello! How are you?<end_of_turn>"


def test_a_template_that_rewrites_history_gives_one_sample_per_answer():
    tokenizer = tiny_tokenizer(REASONING)
    talk = [
        TALK[0], {"role": "assistant", "content": "<think>\ngreet</think>Hello"}, TALK[2],
        {"role": "assistant", "content": "<think>\nend</think>Bye"},
    ]  # fmt: skip
    assert supervised(tokenizer, {"messages": talk}) == ["greet</think>Hello<|im_end|>", "end</think>Bye<|im_end|>"]


def test_an_answer_without_the_thought_that_the_generation_prompt_opens_is_supervised_whole():
    tokenizer = tiny_tokenizer(REASONING)
    assert supervised(tokenizer, {"messages": TALK[:2]}) == ["Hello! How are you?<|im_end|>"]


def test_a_model_whose_template_has_no_end_token_still_learns_to_stop():
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}", "</s>")
    # No generation prompt at all: the header is part of what the model must write.
    assert supervised(tokenizer, {"messages": TALK[:2]}) == ["assistant: Hello! How are you?\n</s>"]


def test_a_base_model_without_template_learns_prompt_and_completion_with_an_end():
    tokenizer = tiny_tokenizer(None, "</s>")
    assert supervised(tokenizer, {"prompt": "2+2=", "completion": "4"}) == ["4</s>"]
    assert supervised(tokenizer, {"messages": TALK}) == [" Hello! How are you?</s>", " Good.\nBye</s>"]


def test_template_none_writes_prompt_and_completion_raw_even_for_a_chat_model(tokenizer):
    assert supervised(tokenizer, {"prompt": "2+2=", "completion": "4"}, template="none") == ["4<|im_end|>"]


def test_raw_text_is_supervised_whole_and_cut_into_pieces(tokenizer):
    encoded = CausalLM().encoder(tokenizer, EncodeOptions(max_length=4))(Example({"text": "abcdefghi"}, "row 1"))
    assert [tokenizer.decode(s.inputs["input_ids"]) for s in encoded.samples] == ["abcd", "efgh", "i<|im_end|>"]
    assert all(s.inputs["labels"] == s.inputs["input_ids"] for s in encoded.samples)


def test_padding_is_masked_by_position_although_pad_and_end_share_an_id(tokenizer):
    task = CausalLM()
    encode = task.encoder(tokenizer, EncodeOptions())
    samples = [s for n in (1, 4) for s in encode(Example({"prompt": "x", "completion": "y" * n}, "row")).samples]
    batch = task.collate(samples, tokenizer)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    for row, sample in enumerate(samples):
        labels = batch["labels"][row]
        assert int((labels == end).sum()) == 1, "the answer's own end token keeps its label"
        assert (labels[sample.length :] == -100).all()
        assert int(batch["attention_mask"][row].sum()) == sample.length


@pytest.mark.parametrize(
    ("policy", "outcome", "samples"),
    [("drop", "dropped: longer than max_length", 0), ("truncate_prompt", "prompt truncated", 1),
     ("error", "over max_length", 0)],
)  # fmt: skip
def test_an_answer_is_never_cut_by_a_long_prompt(tokenizer, policy, outcome, samples):
    example = Example({"prompt": "p" * 200, "completion": "the answer"}, "row 1")
    encoded = CausalLM().encoder(tokenizer, EncodeOptions(max_length=64, overlong=policy))(example)
    assert encoded.outcome == outcome
    assert len(encoded.samples) == samples
    for sample in encoded.samples:
        assert sample.length == 64
        kept = [x for x in sample.inputs["labels"] if x != -100]
        assert tokenizer.decode(kept) == "the answer<|im_end|>"


def test_tools_reach_the_template():
    tokenizer = tiny_tokenizer("{% if tools %}{{ tools[0]['name'] }}|{% endif %}" + CHATML)
    encode = CausalLM().encoder(tokenizer, EncodeOptions())
    (sample,) = encode(Example({"messages": TALK[:2], "tools": [{"name": "lookup"}]}, "row 1")).samples
    assert tokenizer.decode(sample.inputs["input_ids"]).startswith("lookup|")


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA], ids=["chatml", "llama3", "gemma"])
def test_a_conversation_that_the_assistant_opens_supervises_no_header(template):
    tokenizer = tiny_tokenizer(template, "</s>")
    talk = [{"role": "assistant", "content": "Welcome!"}, *TALK[:2]]
    end = {CHATML: "<|im_end|>", LLAMA3: "<|eot_id|>", GEMMA: "<end_of_turn>"}[template]
    assert supervised(tokenizer, {"messages": talk}) == [f"Welcome!{end}", f"Hello! How are you?{end}"]


def test_tool_call_arguments_are_not_quoted_twice():
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    (message,) = check_messages([{"role": "assistant", "content": None, "tool_calls": calls}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    template = CHATML.replace(
        "m['content'] +",
        "(m['tool_calls'][0]['function']['arguments'] | tojson if m['tool_calls'] else m['content']) +",
    )
    talk = [TALK[0], message]
    assert supervised(tiny_tokenizer(template), {"messages": talk}) == ['{"a": 1}<|im_end|>']


def test_settings_that_could_have_no_effect_are_refused(tokenizer):
    with pytest.raises(ValueError, match="chat template"):
        supervised(tiny_tokenizer(None, "</s>"), {"prompt": "a", "completion": "b"}, system_prompt="Be brief.")
    with pytest.raises(ValueError, match="template: none"):
        supervised(tokenizer, {"messages": TALK}, template="none")
