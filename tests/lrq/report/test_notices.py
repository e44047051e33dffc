"""What is said of a plan beside its numbers."""

from __future__ import annotations

import pytest

import inventories
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
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
            "FLUX.1 (dev, schnell, Kontext, Fill) is recognised, and --preset flux1 would keep 8 layers",
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
