"""What the files do to real trained models, against round-to-nearest with amax scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lrq
import real_models

NEAREST = {"simple": True, "scale_search": False}
FORMATS = {
    "nvfp4": {"nvfp4": True},
    "mxfp8": {"mxfp8": True},
    "fp8": {},
    "int8-row": {"int8": True, "scaling_mode": "row"},
}


def converted(source: Path, original: real_models.State, folder: Path, **settings) -> list[real_models.State]:
    """The model as a loader sees it, converted with the settings and rounded to nearest."""
    states = []
    for i, options in enumerate((settings, {**settings, **NEAREST})):
        lrq.quantize(source, folder / f"{i}.safetensors", **options)
        states.append(real_models.load_converted(folder / f"{i}.safetensors", original))
    return states


def ratio(model, reference: torch.Tensor, original: real_models.State, source: Path, folder: Path, **settings) -> float:
    """Distance of the converted model over that of round-to-nearest."""
    ours, nearest = converted(source, original, folder, **settings)
    return model.distance(reference, ours) / model.distance(reference, nearest)


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
def test_digits_others_are_better_for_the_median_sample(name: str, transformer, tmp_path: Path) -> None:
    """At 8 bits one sample in hundreds that becomes another digit outweighs all others: the median does not see it."""
    model, reference, original, source = transformer
    ours, nearest = converted(source, original, tmp_path, **FORMATS[name])
    assert model.distances(reference, ours).median() < model.distances(reference, nearest).median()


def test_a_mixture_of_minilm_is_nearer_than_the_uniform_file_of_that_size(encoder, tmp_path: Path) -> None:
    model, reference, original, source = encoder
    distances, sizes = [], []
    for settings in ({"target_bits": 8.25}, {"mxfp8": True}):
        summary = lrq.quantize(source, tmp_path / "out.safetensors", simple=True, **settings)
        sizes.append(summary.output_size)
        distances.append(model.distance(reference, real_models.load_converted(summary.output, original)))
    assert distances[0] <= 0.9 * distances[1] and sizes[0] <= sizes[1]


def test_digits_samples_are_digits(transformer) -> None:
    """The sampler is right: its images use the whole range of the training data, and classes differ."""
    _, samples, _, _ = transformer
    assert samples.amin() < -0.9 and samples.amax() > 0.9
    images = samples.flatten(1)
    means = torch.stack([images[torch.arange(len(images)) % 10 == digit].mean(0) for digit in range(10)])
    within = torch.cat([images[d::10] - means[d] for d in range(10)]).norm() / len(images) ** 0.5
    between = (means - means.mean(0)).norm() / 10**0.5
    assert between > 0.8 * within
