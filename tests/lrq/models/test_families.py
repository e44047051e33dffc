"""Families that resemble others: each is told by what sets it apart, and keeps what it needs."""

from __future__ import annotations

import pytest

import inventories
from lrq.config import Conversion
from lrq.models.recognition import claims, recognise
from lrq.selection.decide import decide

SIDE = 128


def entries(names: str, layers: str = "", **norms: int) -> inventories.Tensors:
    """Tensors of these names; ``{}`` in them is the number of each of the ``layers``. Norms have the width given."""
    found = [name.format(layer) for layer in layers.split() or [""] for name in names.split()]
    shapes = {key: (norms.get(key.split(".")[-2], SIDE),) if "norm" in key else (SIDE, SIDE) for key in found}
    return {key: ("BF16", shapes[key] if key.endswith("weight") else shapes[key][:1]) for key in shapes}


ATTENTION = """model.embed_tokens.weight lm_head.weight model.layers.{0}.self_attn.q_proj.weight
    model.layers.{0}.self_attn.k_proj.weight model.layers.{0}.self_attn.o_proj.weight
    model.layers.{0}.post_attention_layernorm.weight"""
DENSE = "model.layers.{0}.mlp.gate_proj.weight"
SPARSE = "model.layers.{0}.mlp.gate.weight model.layers.{0}.mlp.experts.0.gate_proj.weight"
Q_NORM = "model.layers.{0}.self_attn.q_norm.weight"
BIAS = "model.layers.{0}.self_attn.k_proj.bias"
SHARED_GATE = "model.layers.{0}.mlp.shared_expert_gate.weight"
MIXTRAL = "model.layers.{0}.block_sparse_moe.gate.weight model.layers.{0}.block_sparse_moe.experts.0.w1.weight"
LATENT = "model.layers.{0}.self_attn.kv_a_proj_with_mqa.weight"
EXPERTS = {
    "DeepSeek V1, ERNIE 4.5": entries(f"{ATTENTION} {DENSE}", "0") | entries(f"{ATTENTION} {SPARSE}", "1 2"),
    "DeepSeek V2": entries(f"{ATTENTION} {LATENT} {DENSE}", "0") | entries(f"{ATTENTION} {LATENT} {SPARSE}", "1 2 3"),
    "GLM-4.5, dots.llm1": entries(f"{ATTENTION} {Q_NORM} {BIAS} {DENSE}", "0 1 2")
    | entries(f"{ATTENTION} {Q_NORM} {BIAS} {SPARSE}", "3 4"),
    "GLM-4.5-Air": entries(f"{ATTENTION} {BIAS} {DENSE}", "0") | entries(f"{ATTENTION} {BIAS} {SPARSE}", "1 2"),
    "OLMoE": entries(f"{ATTENTION} {Q_NORM} {SPARSE}", "0 1", q_norm=2048),
    "Qwen2-MoE": entries(f"{ATTENTION} {BIAS} {SPARSE} {SHARED_GATE}", "0 1"),
    "Mixtral": entries(f"{ATTENTION} {MIXTRAL}", "0 1"),
}
ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "shared_expert_gate.weight", "router.weight")


def quantized(found: inventories.Tensors, *presets: str) -> set[str]:
    decisions = decide(inventories.entries(found), Conversion.from_settings({"nvfp4": True, "preset": presets}), "")
    return {layer.source.name for layer in decisions.layers}


@pytest.mark.parametrize("prefix", ["", "language_model.", "a.b."])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_is_no_dense_model_though_its_first_layers_are(name, prefix):
    found = {prefix + key: value for key, value in EXPERTS[name].items()}
    assert claims(inventories.entries(found)) == [(prefix, "moe")]
    layers = quantized(found)
    assert any("experts" in layer for layer in layers)
    assert not [layer for layer in layers if layer.endswith((*ROUTERS, "lm_head.weight", "kv_a_proj_with_mqa.weight"))]


@pytest.mark.parametrize("preset", ["llama", "qwen2", "qwen3", "moe", "qwen3_moe", "generic_text", "mistral", "gemma4"])
def test_no_preset_quantizes_a_router(preset):
    found = EXPERTS["Qwen2-MoE"] | EXPERTS["Mixtral"] | entries("model.layers.{}.router.weight", "0 1")
    assert not [layer for layer in quantized(found, preset) if layer.endswith(ROUTERS)]


def test_the_generic_policy_quantizes_no_router():
    """Of experts behind other names, too."""
    gates = (
        "mlp.gate",
        "mlp.shared_expert_gate",
        "block_sparse_moe.gate",
        "moe_block.gate",
        "ff_i.gate",
        "router.proj",
    )
    found = entries(" ".join(f"blocks.{{0}}.{gate}.weight" for gate in gates) + " blocks.{0}.fc.weight", "0 1")
    assert quantized(found) == {"blocks.0.fc.weight", "blocks.1.fc.weight"}


DIFFUSERS = """transformer_blocks.{0}.norm1.linear.weight transformer_blocks.{0}.norm1_context.linear.weight
    transformer_blocks.{0}.attn.to_q.weight norm_out.linear.weight proj_out.weight """
SINGLE = "single_transformer_blocks.{0}.proj_mlp.weight single_transformer_blocks.{0}.norm.linear.weight "
REFINER = """x_embedder.proj.weight context_embedder.proj_in.weight
    context_embedder.token_refiner.refiner_blocks.0.norm1.weight
    context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight """
HUNYUAN = DIFFUSERS + SINGLE + REFINER + "time_text_embed.timestep_embedder.linear_1.weight"
FRAMEPACK = f"{HUNYUAN} clean_x_embedder.proj.weight image_projection.up.weight"
GLYPHS = "context_embedder_2.linear_1.weight "
HUNYUAN_IMAGE = DIFFUSERS + SINGLE + REFINER + GLYPHS + "time_guidance_embed.timestep_embedder.linear_1.weight"
HUNYUAN_1_5 = f"""{DIFFUSERS} {REFINER} {GLYPHS} cond_type_embed.weight image_embedder.linear_1.weight
    time_embed.timestep_embedder.linear_1.weight"""
OWN_REFINER = (
    "txt_in.individual_token_refiner.blocks.0.norm1.weight img_in.proj.weight double_blocks.{0}.img_mod.linear.weight"
)
SVD = "input_blocks.0.0.weight label_emb.0.0.weight input_blocks.1.1.time_stack.0.attn1.to_q.weight"
OLMO_2 = f"{ATTENTION} {Q_NORM} {DENSE} model.layers.{{0}}.post_feedforward_layernorm.weight"
COMMAND_R = f"{ATTENTION} {Q_NORM} {DENSE}".replace("model.layers.{0}.post_attention_layernorm.weight", "")
VISUAL = """visual.patch_embed.proj.weight visual.blocks.{0}.attn.qkv.weight visual.blocks.{0}.mlp.fc1.weight
    visual.merger.mlp.0.weight """
SEEN = """model.visual.blocks.{0}.mlp.linear_fc1.weight model.visual.merger.linear_fc1.weight
    model.visual.deepstack_merger_list.0.linear_fc1.weight """
QWEN3 = f"{ATTENTION} {Q_NORM}".replace("model.layers", "model.language_model.layers") + " "
BANK = "model.language_model.layers.{0}.mlp.experts.gate_up_proj model.language_model.layers.{0}.mlp.gate.weight"
MISTRAL_3 = f"""{ATTENTION} {DENSE}""".replace("model.layers", "model.language_model.layers")
PROJECTOR = " model.multi_modal_projector.patch_merger.merging_layer.weight"
UMT5 = """token_embedding.weight blocks.{0}.attn.q.weight blocks.{0}.attn.o.weight blocks.{0}.ffn.gate.0.weight
    blocks.{0}.pos_embedding.embedding.weight norm.weight"""
COSMOS = """patch_embed.proj.weight time_embed.t_embedder.linear_1.weight transformer_blocks.{0}.attn1.to_q.weight
    transformer_blocks.{0}.norm1.linear_1.weight norm_out.linear_1.weight proj_out.weight"""
VACE = """vace_patch_embedding.weight vace_blocks.{0}.self_attn.q.weight vace_blocks.{0}.after_proj.weight
    vace_blocks.{0}.norm3.weight"""

LOOKALIKES = [
    (
        "hunyuan",
        "hunyuan_video",
        HUNYUAN,
        "x_embedder clean_x_embedder context_embedder.proj_in time_text_embed proj_out",
    ),
    ("hunyuan", "hunyuan_video", FRAMEPACK, "clean_x_embedder image_projection"),
    ("hunyuan", "hunyuan_image", HUNYUAN_IMAGE, "time_guidance_embed context_embedder_2"),
    ("hunyuan", "hunyuan_image", OWN_REFINER, "img_in"),
    ("hunyuan", "hunyuan_video", f"{OWN_REFINER} vector_in.in_layer.weight", "vector_in"),
    ("hunyuan_video_1_5", "hunyuan_video", f"{OWN_REFINER} vision_in.proj.0.weight", "vision_in"),
    (
        "hunyuan_video_1_5",
        "hunyuan_video",
        HUNYUAN_1_5,
        "cond_type_embed image_embedder time_embed context_embedder_2 x_embedder context_embedder.proj_in proj_out",
    ),
    (None, "", SVD, "label_emb"),
    (None, "", OLMO_2, "lm_head"),
    (None, "", COMMAND_R, "lm_head"),
    ("qwen2_5_vl", "qwen2_vl", f"{VISUAL} {ATTENTION} {BIAS} {DENSE}", "visual.merger visual.patch_embed"),
    ("qwen3_moe", "qwen3_moe", QWEN3 + SEEN + BANK, "model.visual.merger model.visual.deepstack mlp.gate.weight"),
    (
        "qwen3",
        "qwen3",
        QWEN3 + SEEN + DENSE.replace("model.layers", "model.language_model.layers"),
        "model.visual.merger",
    ),
    ("mistral", "mistral3", MISTRAL_3 + PROJECTOR, "model.multi_modal_projector lm_head"),
    ("t5xxl", "t5", UMT5, "token_embedding pos_embedding"),
    ("cosmos_predict2", "cosmos_predict2", COSMOS, "patch_embed time_embed norm1.linear norm_out proj_out"),
    ("wan", "wan", VACE, "vace_patch_embedding"),
]


@pytest.mark.parametrize(("preset", "family", "names", "kept"), LOOKALIKES)
def test_a_family_that_resembles_another_is_told_apart(preset, family, names, kept):
    found = entries(names, "0 1")
    assert [(part.preset and part.preset.name, part.family) for part in recognise(inventories.entries(found))] == [
        (preset, family)
    ]
    assert len(claims(inventories.entries(found))) == (preset is not None)
    layers = quantized(found)
    assert layers and not [layer for layer in layers if any(word in layer for word in kept.split())]


def test_of_presets_that_claim_alike_the_first_by_name_is_taken():
    """Not the first of a set, whose order is another in every process."""
    both = ("head.modulation", "patch_embedding.weight", "decoder.conv1.weight", "encoder.conv1.weight")
    found = {f"p{i}.{key}": ("BF16", (SIDE, SIDE)) for i in range(32) for key in both}
    assert {part.preset and part.preset.name for part in recognise(inventories.entries(found))} == {"vae"}


def test_the_projection_of_text_of_a_full_ltx_2_checkpoint_is_kept():
    """There it stands beside the model, where no preset reaches it."""
    model = {f"model.diffusion_model.{key}": value for key, value in inventories.tensors("ltx2_19b").items()}
    projection = "text_embedding_projection.aggregate_embed.weight"
    found = model | {projection: ("BF16", (3840, 188160))}
    for presets in ((), ("ltxv2",)):
        layers = quantized(found, *presets)
        assert layers and projection not in layers


def test_a_mixture_of_experts_is_recognised_fast():
    """The names of DeepSeek-V3 are looked through a few times, not once for every preset."""

    class Counted(dict):  # type: ignore[type-arg]
        rounds = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            Counted.rounds += 1
            return super().__iter__()

    found = Counted(inventories.entries(inventories.tensors("deepseek_v3")))
    (part,) = recognise(found)
    assert part.family == "deepseek_v3" and Counted.rounds < 16
