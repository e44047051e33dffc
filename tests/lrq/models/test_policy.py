"""The generic policy, on names of real models."""

from __future__ import annotations

import pytest

from checkpoints import LAYERS, transformer
from lrq.checkpoint.header import Entry
from lrq.checkpoint.reader import CODES
from lrq.models.policy import load_policy

N, K = 64, 32


def refusals(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, str]:
    return load_policy().refusals([Entry(name, dtype, shape, 0, 0) for name, shape in shapes.items()])


def reason(module: str, *shape: int, dtype: str = "BF16") -> str | None:
    return refusals({f"{module}.weight": shape or (N, K)}, dtype).get(f"{module}.weight")


QUANTIZED = [
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_mlp.0",
    "single_blocks.11.linear1",
    "single_blocks.11.linear2",
    "transformer_blocks.3.attn.to_out.0",
    "transformer_blocks.3.ff.net.0.proj",
    "blocks.7.self_attn.q",
    "blocks.7.ffn.2",
    "joint_blocks.5.context_block.attn.qkv",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "layers.9.attention.qkv",
    "layers.9.feed_forward.w2",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.0.mlp.experts.0.gate_proj",
    "encoder.block.0.layer.0.SelfAttention.k",
    "encoder.block.0.layer.1.DenseReluDense.wi",
    "encoder.layer.0.attention.self.query",
    "text_model.encoder.layers.0.mlp.fc1",
    "visual.blocks.0.mlp.gate_proj",
]

KEPT = {
    "embedding": """token_embedding model.embed_tokens embeddings.word_embeddings shared wte transformer.wpe
        encoder.block.0.layer.0.SelfAttention.relative_attention_bias cond_type_embedding y_embedder.embedding_table
        text_model.embeddings.position_embedding label_emb.0.0 text_embedding.0""",
    "norm": """norm blocks.0.norm1 blocks.0.norm3 double_blocks.0.img_attn.norm.query_norm.scale
        model.layers.0.input_layernorm model.layers.0.self_attn.q_norm transformer.h.0.ln_1 ln_f
        encoder.layer.0.output.LayerNorm model.layers.0.post_attention_layernorm layers.0.attention_norm1
        blocks.0.self_attn.norm_q txt_norm""",
    "input or conditioning": """img_in txt_in time_in.in_layer vector_in.out_layer guidance_in.in_layer x_embedder
        t_embedder.mlp.0 cap_embedder.1 context_embedder time_text_embed.timestep_embedder.linear_1 time_embed.0
        time_projection.1 patch_embed.proj patchify_proj img_emb.proj.1
        distilled_guidance_layer.layers.0.in_layer""",
    "modulation": """blocks.0.ada double_blocks.0.img_mod.lin double_blocks.0.txt_mod.lin single_blocks.0.modulation.lin
        transformer_blocks.0.img_mod.1 adaln_single.linear layers.0.adaLN_modulation.0
        joint_blocks.0.x_block.adaLN_modulation.1 double_stream_modulation_img.lin""",
    "output": "lm_head final_layer.linear norm_out.linear head.head classifier score pooler.dense final",
    "router": "model.layers.0.mlp.gate blocks.0.router model.layers.0.block_sparse_moe.gate",
    "not a linear layer's weight": """blocks.0.conv trainable_cond_mask x_pad_token conv_in vae.quant_conv
        blocks.0.scale_shift_table""",
}


@pytest.mark.parametrize("module", QUANTIZED)
def test_linear_layers_are_quantized(module):
    assert reason(module) is None


@pytest.mark.parametrize(("why", "module"), [(why, name) for why, names in KEPT.items() for name in names.split()])
def test_sensitive_layers_are_kept(why, module):
    assert reason(module) is not None
    # Some stand under two rules; the first one speaks.
    if module not in ("norm_out.linear",):
        assert reason(module) == why


def test_patterns_match_whole_parts_of_a_name():
    for lookalike in ("prenormal", "sharedness", "heading", "mlp.gated", "text_embedding_x2", "img_into", "finally"):
        assert reason(f"blocks.0.{lookalike}") is None


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_float_is_quantized(dtype):
    assert reason("blocks.0.fc", dtype=dtype) is None


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "I64", "BOOL", "F4", "C64"])
def test_nothing_else_is(dtype):
    assert reason("blocks.0.fc", dtype=dtype) == dtype


def test_shapes_that_are_no_matrix():
    assert reason("blocks.0.fc", 64) == "not a matrix of weights"
    assert reason("blocks.0.conv3", 8, 4, 3, 3) == "4-D"
    assert reason("blocks.0.conv1d", 8, 4, 3) == "3-D"
    assert reason("blocks.0.fc", 0, 4) == "empty"


def test_expert_banks_are_quantized_and_other_3d_weights_are_not():
    for bank in ("blocks.0.experts", "model.layers.0.mlp.experts.gate_up_proj", "layers.0.expert_w1"):
        assert reason(bank, 4, N, K) is None
    assert reason("blocks.0.patches", 4, N, K) == "3-D"


def test_only_weights_are_quantized():
    others = (
        "blocks.0.fc.bias",
        "blocks.0.fc.lora_A",
        "weight",
        "blocks.0.attn.in_proj_weight",
        "blocks.0.fc.weight_g",
    )
    assert set(refusals(dict.fromkeys(others, (N, K))).values()) == {"not a matrix of weights"}


def test_outside_of_numbered_blocks_is_kept_when_the_blocks_hold_most():
    shapes = {f"blocks.{i}.fc.weight": (N, K) for i in range(3)}
    assert refusals({**shapes, "connector.weight": (N, K)}) == {"connector.weight": "outside of the numbered blocks"}
    assert refusals({**shapes, "connector.weight": (N, 9 * K)}) == {}


def test_a_lone_layer_a_lone_block_and_a_sequence_are_no_numbered_blocks():
    assert refusals({"fc.weight": (N, K)}) == {}
    assert refusals({"blocks.0.fc.weight": (N, K), "out.weight": (N, 1)}) == {}
    assert refusals({"0.weight": (N, K), "2.weight": (N, K), "out.weight": (N, 1)}) == {}


def test_the_small_transformer():
    entries = [Entry(n, CODES[t.dtype], tuple(t.shape), 0, 0) for n, t in transformer().items()]
    kept = load_policy().refusals(entries)
    assert {name for name in transformer() if name not in kept} == {f"{layer}.weight" for layer in LAYERS}
