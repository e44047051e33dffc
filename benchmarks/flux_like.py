"""A bf16 checkpoint with the shapes of FLUX.1's double blocks, of any size, written quickly."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WIDTH = 3072
LINEARS = {
    "img_attn.qkv": (3 * WIDTH, WIDTH),
    "img_attn.proj": (WIDTH, WIDTH),
    "img_mlp.0": (4 * WIDTH, WIDTH),
    "img_mlp.2": (WIDTH, 4 * WIDTH),
}
"""Of one block, with their biases: 226 MB."""


def write_flux_like(path: Path, blocks: int) -> Path:
    """Write ``blocks`` blocks of normal weights; blocks repeat, which no stage of a conversion notices."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for rows, columns in LINEARS.values():
        parts.append(torch.randn(rows, columns, generator=generator).mul_(0.02).bfloat16())
        parts.append(torch.zeros(rows, dtype=torch.bfloat16))
    offset = 0
    for block in range(blocks):
        for number, name in enumerate(LINEARS):
            for kind, tensor in zip(("weight", "bias"), parts[2 * number : 2 * number + 2], strict=True):
                size = tensor.nbytes
                where = [offset, offset + size]
                table[f"double_blocks.{block}.{name}.{kind}"] = {
                    "dtype": "BF16",
                    "shape": list(tensor.shape),
                    "data_offsets": where,
                }
                offset += size
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(blocks):
            for tensor in parts:
                file.write(tensor.view(torch.uint8).numpy().data)
    return path
