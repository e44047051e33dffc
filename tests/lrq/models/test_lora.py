"""A LoRA is no checkpoint."""

from __future__ import annotations

import pytest

from checkpoints import normal, run, save, transformer
from lrq.models.lora import lora_factors

LAYOUTS = {
    "kohya": ("lora_unet_blocks_0_attn.lora_down.weight", "lora_unet_blocks_0_attn.lora_up.weight"),
    "diffusers": ("transformer.blocks.0.attn.lora_A.weight", "transformer.blocks.0.attn.lora_B.weight"),
    "ComfyUI": ("diffusion_model.blocks.0.attn.lora_A.weight", "diffusion_model.blocks.0.attn.lora_B.weight"),
    "PEFT": ("base_model.model.fc.lora_A.default.weight", "base_model.model.fc.lora_B.default.weight"),
    "old diffusers": ("blocks.0.processor.to_q_lora.down.weight", "blocks.0.processor.to_q_lora.up.weight"),
    "LoHa": ("lora_unet_blocks_0_attn.hada_w1_a", "lora_unet_blocks_0_attn.hada_w1_b"),
    "LoKr": ("lora_unet_blocks_0_attn.lokr_w1", "lora_unet_blocks_0_attn.lokr_w2"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_is_refused_with_what_to_do(tmp_path, layout):
    down, up = LAYOUTS[layout]
    tensors = {down: normal(16, 64), up: normal(64, 16), down.rpartition(".lora")[0] + ".alpha": normal(1)}
    source = save(tmp_path / "in.safetensors", tensors)
    for command in (("convert", "-i", source, "--simple"), ("plan", source)):
        result = run(*command)
        assert result.exit_code == 2 and "Traceback" not in result.stderr
        assert f"{source}: is a LoRA ({', '.join(sorted((down, up)))}), not a checkpoint; merge it" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_model_that_carries_a_lora_is_a_model(tmp_path):
    for base in ("blocks.0.attn.qkv", "blocks.0.mlp.fc.base_layer"):
        layer = base.removesuffix(".base_layer")
        tensors = {f"{base}.weight": normal(64, 64), f"{layer}.lora_A.speech.weight": normal(16, 64)}
        assert lora_factors(tensors) == []
    lookalikes = ["explora_A.weight", "blocks.0.lora.0.weight", "adaln_lora.1.weight", "blocks.0.lora_And.weight"]
    assert lora_factors([*transformer(), *lookalikes]) == []
