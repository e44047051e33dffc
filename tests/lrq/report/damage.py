"""A small source, and ways to damage what was made from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

import lrq_kernels
from checkpoints import File, normal, run

SOURCE = {
    "square.weight": normal(64, 64),
    "square.bias": normal(64, seed=1),
    "twin.weight": normal(64, 64, seed=2),
    "tile.weight": normal(128, 128, seed=3),
    "norm.weight": normal(64, seed=4).bfloat16(),
}
RAGGED = {**SOURCE, "ragged.weight": normal(33, 50, seed=5)}


def failures(path: Path, source: Path | None = None) -> list[str]:
    result = run("verify", path, *([] if source is None else ["--source", source]))
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert all(line.startswith("failed: ") for line in lines[:20])
    return [line.removeprefix("failed: ") for line in lines]


def replace(
    suffix: str, change: Callable[[torch.Tensor], torch.Tensor], layer: str = "square"
) -> Callable[[File], None]:
    def apply(file: File) -> None:
        file.tensors[f"{layer}.{suffix}"] = change(file.tensors[f"{layer}.{suffix}"])

    return apply


def drop(*names: str) -> Callable[[File], None]:
    def apply(file: File) -> None:
        for name in names:
            del file.tensors[name]

    return apply


def remark(**keys: object) -> Callable[[File], None]:
    """Change keys of both markers of a layer; None drops one."""

    def apply(file: File) -> None:
        changed = {**file.stated["square"], **keys}
        file.mark("square", {key: value for key, value in changed.items() if value is not None})

    return apply


def restate(layers: Callable[[dict], dict]) -> Callable[[File], None]:
    """Change marker B only."""

    def apply(file: File) -> None:
        file.metadata["_quantization_metadata"] = json.dumps({"layers": layers(file.stated)})

    return apply


def poke(index: tuple[int, ...], value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set one byte of a matrix of bytes."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone().view(torch.uint8)
        changed[index] = value
        return changed.view(tensor.dtype)

    return apply


def unswizzled(scales: torch.Tensor) -> torch.Tensor:
    return lrq_kernels.unswizzle_scales(scales, *scales.shape)


def swap_layers(file: File) -> None:
    for suffix in ("weight", "weight_scale"):
        one, two = f"square.{suffix}", f"twin.{suffix}"
        file.tensors[one], file.tensors[two] = file.tensors[two], file.tensors[one]
