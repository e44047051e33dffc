"""What the presets keep, on the real names and shapes."""

from __future__ import annotations

import json
import math
import tomllib
from importlib import resources

import pytest

import inventories
from checkpoints import run, save, transformer
from lrq.config import Conversion
from lrq.errors import InputError
from lrq.formats import FORMATS
from lrq.models.patterns import Patterns
from lrq.models.preset import find_preset, load_table, presets, read_preset
from lrq.models.recognition import recognise
from lrq.selection.decide import Decisions, decide

TRAPS = """scale_shift_table learnable_registers pad_token cond_type_embedding relative_attention_bias embed_tokens
    position_embedding word_embeddings token_embedding norm_q q_norm x_embedder.proj.1 lm_head img_in txt_in head.head
    patchify_proj proj_out. final_layer mlp.gate. nerf_image_embedder"""
"""Parts of names whose weights no linear layer multiplies with, or that every token passes."""


def decided(name: str, **settings: object) -> Decisions:
    """Decisions on a published model, in 16 bits wherever it comes in 8."""
    found = {
        key: ("BF16" if dtype == "F8_E4M3" else dtype, shape)
        for key, (dtype, shape) in inventories.tensors(name).items()
        if not key.endswith("scale_inv")
    }
    return decide(inventories.entries(found), Conversion.from_settings(settings), name)


@pytest.mark.parametrize("name", inventories.NAMES)
def test_most_of_a_model_is_quantized_and_no_table_or_norm_is(name):
    decisions = decided(name, nvfp4=True)
    quantized = {layer.name for layer in decisions.layers}
    weights = sum(math.prod(layer.source.shape) for layer in decisions.layers)
    kept = sum(
        math.prod(entry.shape)
        for key, entry in inventories.entries(inventories.tensors(name)).items()
        if decisions.kept.get(key) not in (None, "embedding", "4-D", "5-D") and not key.endswith("scale_inv")
    )
    assert weights > 4 * kept
    traps = set(TRAPS.split())
    proj_out = {"proj_out."} if "single_transformer_blocks.0.proj_out" in quantized or "sdxl" in name else set()
    for trap in traps - proj_out:
        caught = {layer for layer in quantized if trap in f"{layer}." and "individual_token_refiner" not in layer}
        assert not caught, trap


@pytest.mark.parametrize("name", [name for name in sorted(presets()) if name != "vae"])
def test_every_pattern_finds_something_in_its_own_models(name):
    """Where an inventory of the preset's family is at hand: no rule of it is dead there as a whole."""
    preset = presets()[name]
    own = [
        inventory
        for inventory in inventories.NAMES
        if recognise(inventories.entries(inventories.tensors(inventory)))[0].preset is preset
    ]
    if not own:
        pytest.skip("no inventory of this model")
    modules = set().union(*map(_modules, own))
    optional = ("image", "sound", "head", "VAE", "condition", "decoder", "output")
    for rule in (*preset.keep, *preset.drop, *preset.rules):
        found = any(rule.patterns.finds(module) for module in modules)
        assert found or any(word in rule.why for word in optional), rule.why


def _modules(inventory: str) -> set[str]:
    entries = inventories.entries(inventories.tensors(inventory))
    prefix = recognise(entries)[0].prefix
    return {name.removeprefix(prefix).removesuffix(".weight") for name in entries}


def test_every_preset_says_why():
    folder = resources.files("lrq.models").joinpath("presets")
    for name in presets():
        text = folder.joinpath(f"{name}.toml").read_text(encoding="utf-8")
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if line in ("[[keep]]", "[[drop]]", "[[rules]]"):
                assert lines[number - 1].startswith("# "), f"{name}: line {number}: why?"
        table = tomllib.loads(text)
        assert table.get("keep") and table["about"] and table["family"] and table["flags"], name
        for rule in table.get("rules", []):
            assert rule["format"] in FORMATS and set(rule["when"]) <= {"fp8", "int8", "nvfp4", "mxfp8"}


def test_modulation_of_flux_takes_8_bits_where_the_rest_takes_4():
    for name in ("flux1_dev", "flux1_dev_diffusers", "flux1_dev_prefixed"):
        formats = {layer.name: (layer.format.name, layer.why) for layer in decided(name, nvfp4=True).layers}
        eight = {layer for layer, (fmt, _) in formats.items() if fmt == "fp8"}
        assert len(eight) == 76 and all("mod" in layer or "norm" in layer for layer in eight)
        assert {why for _, why in formats.values()} == {"", "modulation: 8 bits"}
        assert {layer.format.name for layer in decided(name, mxfp8=True).layers} == {"mxfp8"}


def test_t5_loses_its_decoder():
    decisions = decided("t5xxl_full")
    assert len(decisions.dropped) == 340 and all(name.startswith(("decoder.", "lm_head")) for name in decisions.dropped)
    assert len(decisions.layers) == 24 * 7
    assert not decided("t5xxl_encoder").dropped and not decided("t5xxl_full", preset=["none"]).dropped


def test_presets_combine_and_override_and_can_be_left_away():
    usual = {layer.name for layer in decided("z_image").layers}
    both = {layer.name for layer in decided("z_image", preset=["zimage", "zimage_refiner"]).layers}
    assert usual - both == {name for name in usual if "refiner" in name}
    nothing = {layer.name for layer in decided("z_image", preset=["none"]).layers}
    assert nothing > usual and "x_embedder" in nothing


def test_a_wrong_preset_names_the_right_one():
    with pytest.raises(InputError, match=r"--preset wan: finds no layer in flux1_dev, .*FLUX\.1.*--preset flux1"):
        decided("flux1_dev", preset=["wan"])
    with pytest.raises(InputError, match=r"--preset t5xxl: finds no layer in wan22_ti2v_5b.*--preset wan"):
        decided("wan22_ti2v_5b", preset=["t5xxl"])


def test_a_preset_of_ones_own(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('about = "mine"\n[[keep]]\nwhy = "as I like it"\npatterns = ["single_blocks.0.linear1"]\n')
    decisions = decided("flux1_dev", preset=[load_table(str(path))])
    assert decisions.kept["single_blocks.0.linear1.weight"] == "as I like it"
    assert "single_blocks.10.linear1" in {layer.name for layer in decisions.layers}


def test_names_of_presets_are_checked():
    with pytest.raises(InputError, match=r"no such preset; did you mean zimage"):
        find_preset("zimag")
    assert read_preset("x", {"about": "y"}).family == "any"


def test_patterns_anchor_and_count():
    patterns = Patterns(["^proj_out", "norm*$", "blocks.0.mod"])
    assert patterns.finds("proj_out") and not patterns.finds("blocks.1.proj_out")
    assert patterns.finds("a.norm1") and not patterns.finds("a.norm1.linear")
    assert patterns.finds("blocks.0.mod.1") and not patterns.finds("blocks.10.mod.1")
    assert patterns.has_numbered and not patterns.finds_kind("blocks.#.mod.1")


@pytest.mark.parametrize("given", ["5", '["none"]', "null", "true", '{"keep": 5}', '{"about": "x", "flags": [[]]}'])
def test_a_preset_of_a_plan_that_is_none_is_one_line(tmp_path, given):
    source = save(tmp_path / "in.safetensors", transformer())
    table = json.loads(run("plan", source, "--simple", "--json").stdout)
    table["settings"]["preset"] = [json.loads(given)]
    (tmp_path / "plan.json").write_text(json.dumps(table))
    result = run("convert", "-i", source, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: ") and "preset" in line
