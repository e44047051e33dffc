"""Directions that a LoRA reads: the rows of its A are where inputs of a layer matter for what it was trained on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lrq.calibration.inputs import InputStats

A_OF = re.compile(r"(.+?)\.(?:lora_A(?:\.[^.]+)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight$")
"""The layer of a tensor that holds A [r,K], as PEFT (with an adapter's name), kohya's scripts and diffusers have it."""
PREFIXES = (
    *("base_model.model.", "diffusion_model.", "transformer.", "unet.", "text_encoder.", "model."),
    *("lora_unet_", "lora_transformer_", "lora_te1_", "lora_te2_", "lora_te_"),
)
SHARE = 0.5
"""Of the second moment that lies in the directions of a LoRA."""


def layers_of_lora(keys: Iterable[str], layers: Collection[str]) -> dict[str, str]:
    """The tensor with A by layer, for keys of a LoRA's file.

    A name may be that of a layer, or its end from a dot on, if no other layer ends so; names of kohya's scripts have _
    for every dot. Of two A's for one layer the first counts.
    """
    ends: dict[str, set[str]] = defaultdict(set)
    for layer in layers:
        parts = layer.split(".")
        for i in range(len(parts)):
            end = ".".join(parts[i:])
            # What is dotted is looked up as it stands, what is not with _ for every dot.
            for name in {end, end.replace(".", "_")}:
                ends[name].add(layer)
        for name in {layer, layer.replace(".", "_")}:
            ends[f"{name} as a whole"].add(layer)
    found: dict[str, str] = {}
    for key in sorted(keys):
        match = A_OF.match(key)
        if match is None:
            continue
        name = match[1]
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        whole, fitting = ends.get(f"{name} as a whole", set()), ends.get(name, set())
        chosen = whole if len(whole) == 1 else fitting
        if len(chosen) == 1:
            found.setdefault(next(iter(chosen)), key)
    return found


def with_directions(stats: InputStats, a: Tensor) -> InputStats:
    """The statistics with half of their second moment along the rows of A [r,K], by their singular values.

    Raises:
        ValueError: A has another K, or is not finite.
    """
    if a.dim() != 2 or not a.shape[0] or a.shape[1] != stats.columns:
        raise ValueError(f"A must be [r,{stats.columns}], is {list(a.shape)}")
    if not torch.isfinite(a).all():
        raise ValueError("A is not finite")
    largest = a.double().abs().max()
    if not largest:
        return stats
    _, values, vectors = torch.linalg.svd(a.double() / largest, full_matrices=False)
    kept = values > values[0] * 1e-6
    energy = values[kept].square() * (SHARE * stats.second.sum() / values[kept].square().sum())
    vectors = vectors[kept].mT
    second = (1 - SHARE) * stats.second + (vectors.square() * energy).sum(1)
    # The mean stays: it is part of the second moment, and what the LoRA reads turns about it.
    second = torch.maximum(second, stats.mean.square())
    return replace(stats, second=second, gram=None, vectors=vectors.float(), values=energy.float())
