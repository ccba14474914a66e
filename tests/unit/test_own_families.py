"""Where adapters go in models of many families, found without a table of names."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from lora_ft_adapters.errors import AdapterError
from tests.unit.test_own_methods import METHODS, adapted, base, shake

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"input_ids": torch.tensor([[3, 9, 4, 1]])}


def _bert(kind: str) -> nn.Module:
    import transformers as t

    config = getattr(t, f"{kind}Config")(**SIZES, vocab_size=20, max_position_embeddings=12, pad_token_id=0)
    return getattr(t, f"{kind}ForSequenceClassification")(config)


def _llama(kind: str) -> nn.Module:
    import transformers as t

    extra = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 16, "num_experts": 4}
    config = getattr(t, f"{kind}Config")(
        **SIZES, num_key_value_heads=1, vocab_size=20, **(extra if "Moe" in kind else {}), tie_word_embeddings=False
    )
    return getattr(t, f"{kind}ForCausalLM")(config)


def _gpt2(_: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=12))


def _t5(_: str) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=20))


def _vit(_: str) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4))


def _wav2vec2(_: str) -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    convolutions = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES, **convolutions, **position, vocab_size=20))


# family: (how it is made, attention outputs, feed-forward outputs, where a parallel adapter stands)
FAMILIES = {
    "Llama": (_llama, ["model.layers.0.self_attn.o_proj"], ["model.layers.0.mlp.down_proj"], ["model.layers.0.mlp"]),
    "Qwen3": (_llama, ["model.layers.0.self_attn.o_proj"], ["model.layers.0.mlp.down_proj"], ["model.layers.0.mlp"]),
    "Qwen2Moe": (_llama, ["model.layers.0.self_attn.o_proj"], ["model.layers.0.mlp"], ["model.layers.0.mlp"]),
    "GPT2": (_gpt2, ["transformer.h.0.attn.c_proj"], ["transformer.h.0.mlp.c_proj"], ["transformer.h.0.mlp"]),
    "Bert": (_bert, ["bert.encoder.layer.0.attention.output.dense"], ["bert.encoder.layer.0.output.dense"], None),
    "Roberta": (
        _bert, ["roberta.encoder.layer.0.attention.output.dense"], ["roberta.encoder.layer.0.output.dense"], None,
    ),
    "T5": (
        _t5,
        ["encoder.block.0.layer.0.SelfAttention.o", "decoder.block.0.layer.0.SelfAttention.o",
         "decoder.block.0.layer.1.EncDecAttention.o"],
        ["encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo"],
        ["encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"],
    ),
    "ViT": (_vit, ["vit.layers.0.attention.o_proj"], ["vit.layers.0.mlp.fc2"], ["vit.layers.0.mlp"]),
    "Wav2Vec2": (
        _wav2vec2, ["wav2vec2.encoder.layers.0.attention.out_proj"],
        ["wav2vec2.encoder.layers.0.feed_forward.output_dense"], ["wav2vec2.encoder.layers.0.feed_forward"],
    ),
}  # fmt: skip


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0](family).eval()


def run(family: str, model: nn.Module) -> torch.Tensor:
    if family == "ViT":
        return model(pixel_values=torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)).logits
    if family == "Wav2Vec2":
        return model(torch.sin(torch.arange(100.0))[None]).logits
    return model(**IDS, **({"decoder_input_ids": IDS["input_ids"]} if family == "T5" else {})).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_feed_forward_outputs_are_found(family):
    _, attention, feed_forward, beside = FAMILIES[family]

    def found(method: str) -> list[str]:
        return adapted(method, make(family), r=4).peft_config["default"].adapted_modules

    assert sorted(found("houlsby")) == sorted(attention + feed_forward)
    assert found("pfeiffer") == feed_forward
    assert found("parallel") == (beside or feed_forward)


@pytest.mark.parametrize("method", ["houlsby", "parallel", "loreft", "bitfit", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_is_a_no_op_then_acts_then_loads(family, method, tmp_path):
    want = run(family, make(family))
    options = {"add_bias": True} if method == "bitfit" else {}
    model = adapted(method, make(family), **options)
    model.eval()
    # 1e-5: kernels of some CPUs round by the alignment of their arguments in memory.
    assert torch.allclose(run(family, model), want, atol=1e-5)
    shake(model)
    out = run(family, model)
    assert (out - want).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(family), tmp_path, adapter_name="other")
    assert torch.allclose(run(family, loaded), out, atol=1e-5)
    assert torch.allclose(run(family, model.unload()), want, atol=1e-5)


def _four_bit() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = base()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    packed = bitsandbytes.nn.Linear4bit(child.in_features, child.out_features, bias=False)
                    packed.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False)
                    setattr(parent, name, packed.to("cpu"))
    return model


@pytest.mark.parametrize("method", ["houlsby", "parallel", "compacter", "loreft", "bitfit", "head"])
def test_four_bit_bases_carry_adapters_that_touch_outputs_only(method):
    plain = _four_bit()
    with torch.no_grad():
        want = plain(IDS["input_ids"]).logits
    model = adapted(method, plain, **METHODS[method])
    assert torch.allclose(model(IDS["input_ids"]).logits, want, atol=1e-5)
    model(input_ids=IDS["input_ids"], labels=IDS["input_ids"]).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(g is not None and bool(g.abs().max() > 0) for g in grads)


def test_four_bit_layers_are_not_unfrozen():
    with pytest.raises(AdapterError, match="q_proj is quantised"):
        adapted("layers", _four_bit())
