"""One contract over every registered method: what docs/methods.md says of it is what happens when it is run."""

import json
import re
import warnings

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lora_ft_adapters import list_methods
from scripts import methods_table, survey_methods

FACTS = json.loads(methods_table.FACTS.read_text())
SAID = ("merges", "second", "nf4", "bf16", "generate", "stock")
TRAINED = [n for n, m in list_methods().items() if not m.refusal]


@pytest.fixture(autouse=True)
def _peft_may_warn():
    """Combinations that do not work are tried too, and PEFT warns before it fails; our own warnings stay errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|bitsandbytes)\..*")
        yield


def test_every_method_is_in_the_table_and_the_page_is_what_the_table_gives():
    assert sorted(FACTS) == sorted(list_methods())
    assert methods_table.PAGE.read_text() == methods_table.render(FACTS)


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_does_what_the_table_says(name):
    found, said = survey_methods.row(name), FACTS[name]
    assert found["faults"] == []  # the contract of lora_ft_adapters.contract.check
    assert (found["description"], found["fresh"]) == (said["description"], said["fresh"])
    assert {k: found[k] == "yes" for k in SAID} == {k: said[k] == "yes" for k in SAID}, found
    assert (found["layers"], found["models"]) == (said["layers"], said["models"])


def test_all_types_of_peft_but_two_are_trained_here():
    covered = {m.config_class for m in list_methods().values() if not m.refusal}
    ours = {c for c in PEFT_TYPE_TO_CONFIG_MAPPING.values() if c.__module__.startswith("lora_ft_adapters.")}
    missing = {c.__name__ for c in PEFT_TYPE_TO_CONFIG_MAPPING.values() if c not in covered and c not in ours}
    assert missing == {"CPTConfig", "XLoraConfig"}


@pytest.mark.parametrize("name", ["lora", "houlsby", "vera", "prefix_tuning"])
def test_the_parameters_in_the_table_are_those_of_the_reference_model(name):
    assert survey_methods.reference_parameters(name) == FACTS[name]["parameters"]


LOOKED_FOR = {
    "lora", "rslora", "dora", "pissa", "olora", "eva", "corda", "loraga", "loftq", "orthogonal", "loraplus", "lorafa",
    "adalora", "ia3", "vera", "boft", "oft", "loha", "lokr", "ln_tuning", "fourierft", "randlora", "shira", "c3a",
    "road", "miss", "vblora", "waveft", "hira", "delora", "prefix_tuning", "prompt_tuning", "p_tuning", "cartridge",
    "trainable_tokens", "houlsby", "pfeiffer", "parallel", "compacter", "loreft", "noreft", "direft", "bitfit", "head",
    "layers", "full",
}  # fmt: skip


def test_the_readme_names_methods_that_exist_and_counts_them_right():
    text = (methods_table.ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"\| family \| names \|.*?\n\n", text, re.S)[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named <= set(TRAINED)
    assert int(re.search(r"and (\d+) more of PEFT's", table)[1]) == len(set(TRAINED) - named)
    assert int(re.search(r"any other of (\d+) methods", text)[1]) == len(TRAINED)


def test_names_that_people_look_for_are_there():
    assert set(FACTS) >= LOOKED_FOR
