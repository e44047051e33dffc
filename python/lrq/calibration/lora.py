"""Directions that a LoRA reads: the rows of its A are where inputs of a layer matter for what it was trained on."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lrq.calibration.inputs import InputStats

A_OF = re.compile(r"(.+?)\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)(?:\.default)?\.weight$")
"""The layer of a tensor that holds A [r,K], as PEFT, kohya's scripts and diffusers name it."""
PREFIXES = (
    *("base_model.model.", "diffusion_model.", "transformer.", "unet.", "text_encoder.", "model."),
    *("lora_unet_", "lora_transformer_", "lora_te1_", "lora_te2_", "lora_te_"),
)
SHARE = 0.5
"""Of the second moment that lies in the directions of a LoRA."""


def layers_of_lora(keys: Iterable[str], layers: Collection[str]) -> dict[str, str]:
    """The tensor with A by layer, for keys of a LoRA's file; names of kohya's scripts have _ for every dot."""
    flat = {layer.replace(".", "_"): layer for layer in layers}
    found = {}
    for key in keys:
        match = A_OF.match(key)
        if match is None:
            continue
        name = match[1]
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        name = name.replace(".", "_")
        fitting = [own for own in flat if own == name or own.endswith(f"_{name}")]
        if len(fitting) == 1:
            found[flat[fitting[0]]] = key
    return found


def with_directions(stats: InputStats, a: Tensor) -> InputStats:
    """The statistics with half of their second moment along the rows of A [r,K], by their singular values.

    Raises:
        ValueError: A has another K, or is not finite.
    """
    if a.dim() != 2 or a.shape[1] != stats.columns:
        raise ValueError(f"A must be [r,{stats.columns}], is {list(a.shape)}")
    if not torch.isfinite(a).all():
        raise ValueError("A is not finite")
    _, values, vectors = torch.linalg.svd(a.double(), full_matrices=False)
    if not values.any():
        return stats
    kept = values > values[0] * 1e-6
    energy = values[kept].square() * (SHARE * stats.second.sum() / values[kept].square().sum())
    vectors = vectors[kept].mT
    second = (1 - SHARE) * stats.second + (vectors.square() * energy).sum(1)
    # The mean stays: it is part of the second moment, and what the LoRA reads turns about it.
    second = torch.maximum(second, stats.mean.square())
    return replace(stats, second=second, gram=None, vectors=vectors.float(), values=energy.float())
