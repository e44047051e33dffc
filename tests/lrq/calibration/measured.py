"""Inputs with a mean, and their statistics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from checkpoints import normal
from lrq.calibration.inputs import InputStats
from lrq.calibration.stats import Accumulator, save_stats


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """float32 [tokens,K], correlated, of unequal size, with a mean that is not 0."""
    mixed = normal(tokens, columns, seed=seed) @ (torch.eye(columns) + 0.3 * normal(columns, columns, seed=seed + 1))
    return mixed * torch.logspace(0, -1, columns) + normal(columns, seed=seed + 2)


def statistics(x: Tensor, **options: int) -> InputStats:
    """Of inputs [tokens,K]."""
    accumulator = Accumulator(x.shape[-1], **options)
    accumulator.update(x)
    found = accumulator.result()
    assert found is not None
    return found


def save_for(path: Path, layers: dict[str, Tensor], origin: str = "measured", **options: int) -> Path:
    """A file of statistics of inputs by layer."""
    save_stats(path, {name: statistics(x, **options) for name, x in layers.items()}, origin)
    return path
