"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): y = W x + (lora_alpha / r) B A x.

A starts Kaiming-uniform and B at zero, so a fresh adapter is a no-op.
"""

from peft import LoraConfig

from lora_ft_adapters.registry import Method, register

LORA = register(
    Method(
        name="lora",
        description="Low-rank update of frozen linear, conv and embedding layers; merges into the base.",
        config_class=LoraConfig,
        # r=16 with lora_alpha=32 on all linear layers: the learning rate that is best then hardly depends on r,
        # and is about 10x that of full fine-tuning (Schulman et al., "LoRA without regret", 2025).
        defaults={"r": 16, "lora_alpha": 32},
    )
)
