"""Small safetensors files to convert, files built by hand, and what a converted file holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrq.cli import main

FLAGS: dict[str, tuple[str, ...]] = {
    "fp8": (),
    "fp8-row": ("--scaling_mode", "row"),
    "fp8-block": ("--scaling_mode", "block", "--block_size", "8"),
    "int8-tensor": ("--int8",),
    "int8-row": ("--int8", "--scaling_mode", "row"),
    "int8-block": ("--int8", "--block_size", "8"),
    "int8-row-convrot16": ("--int8", "--scaling_mode", "row", "--convrot", "--convrot-group-size", "16"),
    "nvfp4": ("--nvfp4",),
    "mxfp8": ("--mxfp8",),
}
"""The flags of every format, with blocks and groups small enough for small layers."""
STOCK = ("fp8", "int8-tensor", "int8-row", "int8-row-convrot16", "nvfp4", "mxfp8")
"""Formats that stock ComfyUI loads."""
REFUSE_RAGGED = ("fp8-block", "int8-block", "int8-row-convrot16")
"""Formats that can't take every shape."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal weights."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transformer(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Two blocks and what stands around them; [48,32] and [32,64] fit every format."""
    tensors = {"pos": normal(1, 4, 32, dtype=dtype), "tokens": torch.arange(7), "token_embedding.weight": normal(9, 32)}
    for i in range(2):
        block = f"blocks.{i}"
        tensors |= {
            f"{block}.norm1.weight": normal(32, seed=10 + i),
            f"{block}.attn.qkv.weight": normal(48, 32, seed=20 + i, dtype=dtype),
            f"{block}.attn.qkv.bias": normal(48, seed=30 + i, dtype=dtype),
            f"{block}.mlp.fc.weight": normal(32, 64, seed=40 + i, dtype=dtype),
            f"{block}.conv.weight": normal(8, 4, 3, 3, seed=50 + i, dtype=dtype),
        }
    return tensors


LAYERS = ("blocks.0.attn.qkv", "blocks.0.mlp.fc", "blocks.1.attn.qkv", "blocks.1.mlp.fc")
"""The layers of :func:`transformer` that are quantized."""


@dataclass
class File:
    """A whole checkpoint in memory."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def stated(self) -> dict[str, dict[str, Any]]:
        """Marker B by layer."""
        return json.loads(self.metadata["_quantization_metadata"])["layers"]

    @property
    def marked(self) -> dict[str, dict[str, Any]]:
        """Marker A by layer."""
        found = {
            name.removesuffix(".comfy_quant"): t for name, t in self.tensors.items() if name.endswith(".comfy_quant")
        }
        return {name: json.loads(bytes(tensor.tolist())) for name, tensor in found.items()}

    def mark(self, layer: str, marker: dict[str, Any]) -> None:
        """Set both markers of a layer."""
        self.tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
        self.metadata["_quantization_metadata"] = json.dumps({"layers": {**self.stated, layer: marker}})


def load(path: Path) -> File:
    """Read a file with the safetensors library."""
    with safe_open(path, "pt") as file:
        return File({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a file with the safetensors library."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*flat)


def record(dtype: str = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def by_hand(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def run(*args: object) -> Result:
    """Run ``lrq`` in this process."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def convert(source: Path, output: Path, *flags: object) -> Result:
    """Convert with round-to-nearest, which must succeed."""
    result = run("convert", "-i", source, "-o", output, "--simple", *flags)
    assert result.exit_code == 0, result.output
    return result


def tampered(good: Path, change: Callable[[File], None]) -> Path:
    """A copy of a file with one thing changed."""
    file = load(good)
    change(file)
    return save(good.with_name("tampered.safetensors"), file.tensors, file.metadata)


def process(*args: object, **options: object) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "lrq.cli", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
