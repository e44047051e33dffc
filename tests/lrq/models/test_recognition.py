"""Every published model is recognised, whatever stands in front of its names."""

from __future__ import annotations

import pytest

import inventories
from lrq.models.preset import by_flag, presets
from lrq.models.recognition import assign, claims, recognise

PREFIXES = ("", "model.diffusion_model.", "net.", "transformer.", "text_encoders.x.transformer.", "a.b.c.")


def bare(name: str) -> inventories.Tensors:
    """An inventory without the prefix that it comes with."""
    found = inventories.tensors(name)
    prefix = recognise(inventories.entries(found))[0].prefix
    return {key.removeprefix(prefix): value for key, value in found.items()}


@pytest.mark.parametrize("name", inventories.NAMES)
def test_the_family_is_found_and_no_other_preset_claims_it(name):
    entries = inventories.entries(inventories.tensors(name))
    (part,) = recognise(entries)
    assert part.family == inventories.family(name)
    assert part.preset is not None and claims(entries) == [(part.prefix, part.preset.name)]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "name", ["flux1_dev", "wan21_t2v_1_3b", "gemma3_12b", "gemma3_12b_te", "t5xxl_full", "qwen3_8b_te"]
)
def test_any_prefix_will_do(name, prefix):
    renamed = {prefix + key: value for key, value in bare(name).items()}
    (part,) = recognise(inventories.entries(renamed))
    assert (part.prefix, part.family) == (prefix, inventories.family(name))


LANGUAGE_MODELS = [name for name in inventories.NAMES if "model.layers.0.mlp.gate_proj.weight" in bare(name)]
LANGUAGE_MODELS += ["gemma3_12b", "qwen3_30b_a3b"]
"""Known without ``model.`` as well: there any word before ``layers`` is a prefix."""


@pytest.mark.parametrize("name", sorted(set(inventories.NAMES) - set(LANGUAGE_MODELS)))
def test_names_that_only_end_alike_are_not_taken(name):
    """A prefix ends at a dot: ``my_img_in`` is not ``img_in``."""
    renamed = {f"my_{key}": value for key, value in bare(name).items()}
    assert [part.preset for part in recognise(inventories.entries(renamed))] == [None]


@pytest.mark.parametrize("prefix", ["", "a.b."])
@pytest.mark.parametrize("name", sorted(set(LANGUAGE_MODELS) - {"gemma3_12b", "mistral_small_24b_2501"}))
def test_a_language_model_is_known_without_its_head(name, prefix):
    """As embedding models are saved: ``layers``, not ``model.layers``; what stands beside the model is gone."""
    found = {key.removeprefix("model."): value for key, value in bare(name).items() if key.startswith("model.")}
    (part,) = recognise(inventories.entries({prefix + key: value for key, value in found.items()}))
    text = {"qwen2_5_vl": "qwen2"}.get(inventories.family(name), inventories.family(name))
    assert (part.prefix, part.family) == (prefix, text)


ALL_IN_ONE = {
    "model.diffusion_model.": "sdxl_unet",
    "conditioner.embedders.0.transformer.": "clip_l_te",
    "text_encoders.t5xxl.transformer.": "t5xxl_encoder",
    "text_encoders.gemma3_12b.transformer.": "gemma3_12b_te",
}


def test_an_all_in_one_checkpoint_gets_each_parts_preset():
    found: inventories.Tensors = {}
    for prefix, name in ALL_IN_ONE.items():
        found |= {prefix + key: value for key, value in bare(name).items()}
    found |= {
        f"first_stage_model.{key}.weight": ("F16", (8, 8, 3, 3)) for key in ("encoder.conv_in", "decoder.conv_in")
    }
    found["first_stage_model.decoder.mid.attn_1.q.weight"] = ("F16", (512, 512))
    entries = inventories.entries(found)
    parts = recognise(entries)
    families = {prefix: inventories.family(name) for prefix, name in ALL_IN_ONE.items()}
    assert {part.prefix: part.family for part in parts} == families | {"first_stage_model.": "vae"}
    assigned = assign(parts, entries.values())
    assert sum(map(len, assigned.values())) == len(entries)
    assert all(entry.name.startswith(prefix) for prefix, members in assigned.items() for entry in members)


def test_a_bare_model_beside_a_vae_keeps_the_vae_apart():
    found = bare("ltx2_19b") | {
        f"vae.{part}.conv_in.conv.weight": ("BF16", (4, 4, 3, 3, 3)) for part in ("encoder", "decoder")
    }
    assert [(part.prefix, part.family) for part in recognise(inventories.entries(found))] == [
        ("", "ltxav"),
        ("vae.", "vae"),
    ]


VARIANTS: dict[str, tuple[str, ...]] = {
    "flux2": ("double_stream_modulation_img.linear.weight",),
    "wan": ("condition_embedder.time_proj.weight", "patch_embedding.weight"),
    "lumina2": ("time_caption_embed.caption_embedder.1.weight", "noise_refiner.0.attn.norm_k.weight"),
    "sd3": ("pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.weight"),
    "sdxl": ("add_embedding.linear_1.weight", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
    "krea2": ("txtfusion.projector.weight",),
    "ideogram4": ("llm_cond_proj.weight", "layers.0.adaln_modulation.weight"),
    "boogu": ("double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight",),
    "lens": ("transformer_blocks.0.attn.img_qkv.weight", "transformer_blocks.0.img_mlp.w1.weight"),
    "qwen35": ("model.language_model.layers.0.linear_attn.in_proj_a.weight",),
    "gemma4": (
        "model.layers.0.post_feedforward_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.layer_scalar",
    ),
    "qwen3": (
        "layers.0.self_attn.q_norm.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.post_attention_layernorm.weight",
        "embed_tokens.weight",
    ),
    "qwen2": ("model.layers.0.self_attn.k_proj.bias", "model.layers.0.mlp.gate_proj.weight"),
    "clip_vision": ("vision_model.encoder.layers.0.self_attn.q_proj.weight",),
}


@pytest.mark.parametrize("family", VARIANTS)
def test_other_layouts_and_models_are_told_by_their_keys(family):
    entries = inventories.entries(dict.fromkeys(VARIANTS[family], ("BF16", (64, 64))))
    assert [part.family for part in recognise(entries)] == [family]
    assert len({name for _, name in claims(entries)}) == 1


@pytest.mark.parametrize(
    ("family", "q_proj", "gate_proj", "vocabulary"),
    [
        ("mistral", (4096, 4096), (14336, 4096), 32768),
        ("mistral", (4096, 4096), (14336, 4096), 32000),
        ("mistral", (4096, 4096), (12288, 4096), 131072),
        ("mistral", (12288, 12288), (28672, 12288), 32768),
        ("llama", (4096, 4096), (14336, 4096), 32002),
        ("llama", (4096, 4096), (14336, 4096), 128256),
        ("llama", (4096, 4096), (11008, 4096), 32000),
        ("llama", (8192, 8192), (28672, 8192), 128256),
        ("mistral3", (4096, 5120), (14336, 5120), 131072),
    ],
)
def test_llama_and_mistral_are_told_apart_by_shapes(family, q_proj, gate_proj, vocabulary):
    found = {
        "model.embed_tokens.weight": ("BF16", (vocabulary, q_proj[1])),
        "model.layers.0.self_attn.q_proj.weight": ("BF16", q_proj),
        "model.layers.0.mlp.gate_proj.weight": ("BF16", gate_proj),
        "model.layers.0.post_attention_layernorm.weight": ("BF16", q_proj[1:]),
    }
    (part,) = recognise(inventories.entries(found))
    assert part.family == family and len(claims(inventories.entries(found))) == 1
    # Also where the vocabulary is another one, and shapes don't tell.
    assert "Mistral" in part.about


def test_an_unknown_model_is_not_recognised():
    assert [part.preset for part in recognise(inventories.entries({"blocks.0.fc.weight": ("F32", (8, 8))}))] == [None]
    assert recognise({}) == []


MANUAL = "flux2 distillation_large nerf_large wan hunyuan qwen zimage t5xxl mistral"
OTHERS = """distillation_small nerf_small radiance zimage_refiner krea2 ideogram4 boogu ltxv2 anima lens gemma4 qwen35
    visual generic_text"""


def test_the_flags_that_users_know_are_there():
    assert set(f"{MANUAL} {OTHERS}".split()) <= by_flag().keys()
    assert {
        "flux1",
        "chroma",
        "hunyuan_video_1_5",
        "sd35",
        "sdxl",
        "gemma3",
        "qwen3",
        "llama3",
        "qwen3_moe",
    } <= by_flag().keys()
    names = [flag for preset in presets().values() for flag in preset.flags]
    assert len(names) == len(set(names))
