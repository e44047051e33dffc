"""What the files do to real trained models, against round-to-nearest with amax scales (ROUNDING.md section 4)."""

from __future__ import annotations

from pathlib import Path

import pytest
import real_models
import torch
from safetensors import safe_open

import lrq
from lrq.dialects import comfyui
from lrq.formats import read_format

NEAREST = {"simple": True, "scale_search": False}
FORMATS = {
    "nvfp4": {"nvfp4": True},
    "mxfp8": {"mxfp8": True},
    "fp8": {},
    "int8-row": {"int8": True, "scaling_mode": "row"},
}


def load(path: Path, original: real_models.State) -> real_models.State:
    """The state dict that a loader makes of a converted file: every layer dequantized from its marker."""
    state = dict(original)
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in [n.removesuffix(".comfy_quant") for n in stored if n.endswith(".comfy_quant")]:
        marker = comfyui.read_marker_tensor(stored[f"{name}.comfy_quant"].numpy().tobytes())
        parts = {s: stored[f"{name}.{s}"] for s in comfyui.STORED if f"{name}.{s}" in stored}
        fmt = read_format(marker, {suffix: tuple(t.shape) for suffix, t in parts.items()})
        state[f"{name}.weight"] = fmt.dequantize(parts, tuple(original[f"{name}.weight"].shape))
    return state


def ratio(model, reference: torch.Tensor, original: real_models.State, source: Path, folder: Path, **settings) -> float:
    """Distance of the converted model over that of round-to-nearest."""
    distances = []
    for i, options in enumerate(({**settings}, {**settings, **NEAREST})):
        output = folder / f"{i}.safetensors"
        lrq.quantize(source, output, **options)
        distances.append(model.distance(reference, load(output, original)))
    return distances[0] / distances[1]


@pytest.fixture(scope="module")
def encoder(minilm: Path):
    sentences = real_models.english_sentences(512)
    assert len(sentences) >= 500
    model, original = real_models.MiniLM(sentences), real_models.load_minilm()
    return model, model.embed(original), original, minilm


@pytest.fixture(scope="module")
def transformer(digits: Path):
    model, original = real_models.DigitsDiT(), real_models.load_digits()
    return model, model.sample(original), original, digits


def test_minilm_nvfp4(encoder, tmp_path: Path) -> None:
    assert ratio(*encoder, tmp_path, nvfp4=True) <= 0.85


def test_digits_nvfp4(transformer, tmp_path: Path) -> None:
    assert ratio(*transformer, tmp_path, nvfp4=True) <= 0.90


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "nvfp4"])
def test_digits_others_are_not_worse(name: str, transformer, tmp_path: Path) -> None:
    assert ratio(*transformer, tmp_path, **FORMATS[name]) <= 1.02


def test_digits_samples_are_digits(transformer) -> None:
    """The sampler is right: its images use the whole range of the training data, and classes differ."""
    _, samples, _, _ = transformer
    assert samples.amin() < -0.9 and samples.amax() > 0.9
    images = samples.flatten(1)
    means = torch.stack([images[torch.arange(len(images)) % 10 == digit].mean(0) for digit in range(10)])
    within = torch.cat([images[d::10] - means[d] for d in range(10)]).norm() / len(images) ** 0.5
    between = (means - means.mean(0)).norm() / 10**0.5
    assert between > 0.8 * within
