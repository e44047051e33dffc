"""What is said of a plan beside its numbers."""

from __future__ import annotations

import pytest

import inventories
from checkpoints import convert, normal, run, save, transformer
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
from lrq.models.preset import find_preset
from lrq.plan import make_plan
from lrq.report.notices import notices


def said(tmp_path, name: str, **settings: object) -> list[str]:
    path = inventories.sparse(tmp_path / "in.safetensors", inventories.tensors(name))
    conversion = Conversion.from_settings({"nvfp4": True, **settings})
    with Reader(path) as source:
        return notices(make_plan(source, conversion), conversion)


@pytest.mark.parametrize(
    "name, preset, words",
    [
        (
            "flux1_dev",
            "qwen_image",
            "FLUX.1 (dev, schnell, Kontext, Fill) is recognised, and --preset qwen_image is for Qwen-Image (also Edit, "
            "2512); --preset flux1 would keep 8 layers",
        ),
        (
            "z_image",
            "zimage_refiner",
            "Z-Image is recognised, and --preset zimage would keep 36 layers (x_embedder, ...)",
        ),
        ("flux1_dev", "none", "--preset flux1 would keep 10 layers"),
    ],
)
def test_what_another_preset_leaves_unprotected_is_said(tmp_path, name, preset, words):
    """A pattern like img_in finds something in many models: a wrong preset then is no error."""
    (line,) = said(tmp_path, name, preset=(preset,))
    assert line.startswith(words) or words in line, line
    assert line.endswith("that will be quantized")


def test_nothing_is_said_of_presets_that_keep_what_the_model_needs(tmp_path):
    assert said(tmp_path, "z_image", preset=("zimage", "zimage_refiner")) == said(tmp_path, "flux1_dev") == []
    assert said(tmp_path, "z_image", preset=("zimage_refiner",), exclude_layers="embedder|adaLN|final") == []


@pytest.mark.parametrize("preset", ["flux2", "chroma", "distillation_large"])
def test_a_preset_of_another_family_is_said_though_it_keeps_what_the_model_needs(tmp_path, preset):
    """It keeps the inputs and outputs of FLUX.1, too, but makes 4 bits of the modulation's 8."""
    usual, chosen = find_preset("flux1").about, find_preset(preset)
    assert any(
        line.startswith(f"{usual} is recognised, and --preset {chosen.name} is for {chosen.about}")
        for line in said(tmp_path, "flux1_dev", preset=(preset,))
    )


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("hunyuan_video_1_5", "hunyuan"),
        ("mistral_small_24b_te", "mistral"),
        ("qwen2_5_vl_7b_te", "visual"),
        ("chroma1", "distillation_small"),
    ],
)
def test_a_preset_of_the_family_or_of_any_is_no_stranger(tmp_path, name, preset):
    assert not [line for line in said(tmp_path, name, preset=(preset,)) if "is for" in line]


def test_a_preset_that_keeps_all_names_the_model_that_it_is_not_for(tmp_path):
    path = inventories.sparse(tmp_path / "in.safetensors", inventories.tensors("flux1_dev"))
    result = run("convert", "-i", path, "--vae", "--simple")
    assert result.exit_code == 2 and "recognised as FLUX.1" in result.stderr and "--preset flux1" in result.stderr
    planned = run("plan", path, "--vae").stdout
    assert "FLUX.1 (dev, schnell, Kontext, Fill) is recognised, and --preset vae is for VAE" in planned


@pytest.mark.parametrize(
    ("name", "parts"),
    [("model-00002-of-00003", 3), ("model-00001-of-00001", 0), ("model-2", 0)],
)
def test_a_shard_alone_is_said_to_be_one(tmp_path, name, parts):
    path = save(tmp_path / f"{name}.safetensors", transformer())
    words = f"{path.name} is one of {parts} parts of a model; name their index or folder instead"
    assert (words in convert(path, tmp_path / "out.safetensors").stderr) == bool(parts)
    assert (words in run("plan", path).stdout) == bool(parts)


def test_all_shards_together_are_not(tmp_path):
    for i in (1, 2):
        save(tmp_path / f"model-0000{i}-of-00002.safetensors", {f"blocks.{i}.fc.weight": normal(32, 32)})
    assert "parts of a model" not in run("plan", tmp_path).stdout
