"""Parts of the base trained as adapters (head, layers, full) and BitFit: ties, buffers, dtypes and exact merges."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.registry import build_config
from tests.conftest import tiny_llama
from tests.tiny import checkpoint_activations
from tests.unit.test_own_families import make, run
from tests.unit.test_own_methods import IDS, adapted, base, shake, train

UNTIES = pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")


class Net(nn.Module):
    """A CNN with batch norms, a bare parameter beside modules, and one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Module()
        self.body.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.body.conv, self.body.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.mix = nn.Linear(4, 4)
        self.again = self.mix
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.body.norm(self.body.conv(x)) * self.body.scale
        return self.head(self.again(torch.tanh(self.mix(x.mean((2, 3))))))


PIXELS = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6) ** 3


def steps(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        (model(PIXELS) ** 2).sum().backward()
        optimizer.step()
    model.eval()


def test_full_training_is_the_same_as_training_the_model_itself():
    plain = Net()
    steps(plain)
    model = adapted("full", Net())
    steps(model)
    assert torch.allclose(model(PIXELS), plain(PIXELS), atol=1e-6)
    merged = model.merge_and_unload().state_dict()
    for name, value in plain.state_dict().items():
        assert torch.allclose(merged[name].float(), value.float(), atol=1e-6), name
    assert merged["body.norm.num_batches_tracked"] == 3


def test_running_statistics_of_the_base_are_left_alone_and_those_of_the_copy_are_saved(tmp_path):
    before = {n: v.clone() for n, v in Net().state_dict().items()}
    model = adapted("full", Net())
    steps(model)
    want = model(PIXELS)
    model.save_pretrained(tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(Net(), tmp_path, "else")(PIXELS), want, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(model(PIXELS), Net().eval()(PIXELS))
    after = model.unload().state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_layer_in_two_places_has_one_copy():
    model = adapted("layers", Net(), target_modules=["mix"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20
    shake(model)
    net = model.base_model.model
    assert net.mix is net.again
    net = model.unload()
    assert net.mix is net.again
    assert type(net.again) is nn.Linear


def test_tied_embeddings_stay_tied_in_full(tmp_path):
    model = adapted("full")
    copies = [n for n, p in model.named_parameters() if p.requires_grad and ("embed_tokens" in n or "lm_head" in n)]
    assert len(copies) == 1
    train(model)
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path, "else")(IDS).logits, want)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.allclose(merged(IDS).logits, want, atol=1e-5)


@UNTIES
def test_tied_head_is_untied_by_head_and_the_embedding_keeps_its_weights(tmp_path):
    model = adapted("head")
    assert model.peft_config["default"].adapted_modules == ["lm_head"]
    train(model)
    want = model(IDS).logits
    merged = model.merge_and_unload()
    assert torch.allclose(merged(IDS).logits, want, atol=1e-6)
    assert torch.equal(merged.model.embed_tokens.weight, base().model.embed_tokens.weight)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    assert torch.allclose(type(merged).from_pretrained(tmp_path)(IDS).logits, want, atol=1e-6)


def test_head_of_models_without_output_embeddings():
    assert adapted("head", Net()).peft_config["default"].adapted_modules == ["head"]
    roberta = adapted("head", make("Roberta")).peft_config["default"].adapted_modules
    assert roberta == ["classifier.dense", "classifier.out_proj"]
    assert adapted("head", make("ViT")).peft_config["default"].adapted_modules == ["classifier"]


def test_head_of_a_classification_task_is_not_trained_twice(tmp_path):
    from peft import get_peft_model

    def wrap():
        return get_peft_model(make("Bert"), build_config("head", {}, "SEQ_CLS"))

    model = wrap()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.classifier.lft_unfrozen_.default.weight",
        "base_model.model.classifier.lft_unfrozen_.default.bias",
    ]
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("Bert"), tmp_path)
    assert torch.allclose(run("Bert", loaded), run("Bert", model.eval()), atol=1e-6)


def test_mlp_beside_the_head_adds_up_gelu_down():
    model = adapted("head", Net().double(), mlp_dim=3)
    shake(model)
    layer = model.base_model.model.head
    copy, x = layer.adapters["default"], torch.randn(5, 4, dtype=torch.float64)
    down = x @ copy.beside.down.weight.T + copy.beside.down.bias
    gelu = 0.5 * down * (1 + torch.erf(down / 2**0.5))
    want = x @ copy.weight.T + copy.bias + gelu @ copy.beside.up.weight.T + copy.beside.up.bias
    assert torch.allclose(layer(x), want, atol=1e-12)


def test_last_blocks_and_chosen_blocks():
    def blocks(**options):
        names = adapted("layers", **options).peft_config["default"].adapted_modules
        return {n.split(".")[2] for n in names}

    assert blocks() == {"0", "1"}
    assert blocks(last=1) == {"1"}
    assert blocks(layers_to_transform=[0]) == {"0"}
    with pytest.raises(AdapterError, match="not both"):
        build_config("layers", {"last": 1, "layers_to_transform": [0]})


def test_two_copies_active_at_once_add_their_changes():
    model = adapted("layers", Net(), target_modules=["head"])
    shake(model)
    model.add_adapter("second", build_config("layers", {"target_modules": ["head"]}))
    layer = model.base_model.model.head
    with torch.no_grad():
        layer.adapters["second"].weight.add_(0.5)
    model.base_model.set_adapter(["default", "second"])
    assert torch.allclose(layer.weight, layer.adapters["default"].weight + 0.5, atol=1e-6)


def test_attention_that_reads_weights_without_calling_layers_is_trained_whole():
    torch.manual_seed(0)
    model = adapted("full", nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1))
    model.train()
    model(torch.randn(2, 3, 8)).pow(2).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_bf16_base_trains_float32_copies_that_merge_into_bf16():
    model = adapted("full", base().bfloat16())
    train(model, 1)
    want = model(IDS).logits
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(merged(IDS).logits, want)


def test_gradient_checkpointing_trains_the_copies():
    grads = []
    for checkpointing in (False, True):
        model = adapted("full")
        if checkpointing:
            checkpoint_activations(model.base_model.model)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


def test_what_cannot_be_trained_is_refused():
    quantised = Net()
    quantised.mix.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match="mix is quantised"):
        adapted("full", quantised)
    bare = nn.Linear(2, 2)
    with pytest.raises(AdapterError, match="belongs to the model itself"):
        adapted("full", bare)


# ---- BitFit ----


def test_bitfit_is_training_the_biases_and_merges_into_them():
    plain = Net()
    for name, p in plain.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    steps(plain)
    model = adapted("bitfit", Net())
    steps(model)
    assert torch.allclose(model(PIXELS), plain(PIXELS), atol=1e-5)
    trained = model.base_model.model.head.base_layer.bias.clone()
    model.merge_adapter()
    assert torch.allclose(model(PIXELS), plain(PIXELS), atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.head.base_layer.bias, trained)
    merged = model.merge_and_unload()
    for name, p in plain.named_parameters():
        assert torch.allclose(dict(merged.named_parameters())[name], p, atol=1e-5), name


def test_bitfit_needs_biases():
    with pytest.raises(AdapterError, match="no layer of this model has a bias") as caught:
        adapted("bitfit", tiny_llama(16))
    assert "add_bias" in caught.value.fix


def test_bias_shared_by_two_modules_stays_shared_after_merging():
    net = Net()
    net.head2 = nn.Linear(4, 2)
    net.head2.bias = net.head.bias
    model = adapted("bitfit", net, target_modules=["head"])
    shake(model)
    merged = model.merge_and_unload()
    assert merged.head.bias is merged.head2.bias
