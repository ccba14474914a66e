"""A method in a package of somebody else's is one file: it is listed, trains, saves and loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

ONE_FILE = '''
"""Gain: every output feature is scaled by a trained 1 + g."""
from dataclasses import dataclass

import torch
from torch import nn

from lora_ft_adapters.layer import AdapterLayer
from lora_ft_adapters.plugin import AdapterConfig, AdapterTuner, PluginType, plug_in
from lora_ft_adapters.registry import Method, register


@dataclass
class GainConfig(AdapterConfig):
    peft_key = PluginType("SOMEBODY_GAIN")


class Gain(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(features))

    def forward(self, y, x):
        return self.gain * y


class GainLayer(AdapterLayer):
    prefix = "somebody_gain_"


class GainTuner(AdapterTuner):
    prefix = "somebody_gain_"
    tuner_layer_cls = GainLayer

    def build(self, config, layer, name, adapter_name):
        return Gain(layer.get_base_layer().out_features)


plug_in(GainConfig.peft_key, GainConfig, GainTuner)
register(Method("gain", "Scales every output feature.", GainConfig, family="somebody's"))
'''

USE = """
import json, sys
import lora_ft
from lora_ft.cli import main
from lora_ft_adapters.contract import check
from scripts.survey_methods import llama, text

report = check("gain", text(llama))
assert not report.faults, report.faults
assert (report.stock, report.second, report.parameters) == ("after import", "yes", 512), report
recipe = json.loads(sys.argv[1])
run = lora_ft.train(recipe, out=sys.argv[2])
assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
assert "lora_ft_adapters.list_methods()" in (run.adapter / "README.md").read_text()
lora_ft.export(run, sys.argv[2] + "-peft", format_name="peft")
assert abs(lora_ft.evaluate_run(run)[0]["after"]["loss"] - run.metrics["after"]["loss"]) < 1e-5
try:
    lora_ft.merge(run, sys.argv[2] + "-merged")
except lora_ft.errors.UsageError as error:
    assert "cannot be merged" in str(error)
sys.argv = ["lora-ft", "list", "methods"]
main()
"""


def test_a_method_in_one_file_of_another_package_does_all_that_ours_do(recipe, tmp_path):
    site = tmp_path / "site"
    facts = site / "somebody_gain-1.0.dist-info"
    facts.mkdir(parents=True)
    (site / "somebody_gain.py").write_text(ONE_FILE)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody-gain\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[lora_ft.methods]\ngain = somebody_gain\n")
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(site), str(root), str(root / "adapters")])
    recipe["method"] = {"type": "gain"}
    recipe["train"]["learning_rate"] = 5e-2
    made = subprocess.run(
        [sys.executable, "-c", USE, json.dumps(recipe), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    assert "\n gain " in made.stdout
