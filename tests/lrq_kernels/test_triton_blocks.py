"""The Triton kernels of block formats: what they compile to for absent GPUs, and their bits where they use reciprocals.

NVFP4's reciprocals and its sieve need a fused multiply-add, which Triton's interpreter lacks. This file run as a script
lends it an exact one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from test_triton import compiled, compiles, resource_usage

KERNELS = ("nvfp4 rule", "nvfp4 search", "nvfp4 expand", "mxfp8 rule", "mxfp8 search", "mxfp8 expand")
BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
CONVERSIONS = {
    "nvfp4 expand": "cvt.rn.f16x2.e4m3x2",
    "mxfp8 rule": "cvt.rn.satfinite.e4m3x2.f32",
    "mxfp8 search": "cvt.rn.satfinite.e4m3x2.f32",
    "mxfp8 expand": "cvt.rn.f16x2.e4m3x2",
}


def compiled_kernel(name: str, architecture: int, dtype: str = "bf16", given: bool = False, ones: bool = False):
    """A kernel as it is launched on ``architecture``, and its number of threads."""
    from lrq_kernels.triton import mxfp8, nvfp4

    format, kind = name.split()
    module = {"nvfp4": nvfp4, "mxfp8": mxfp8}[format]
    config = dict(getattr(module, f"_{kind.upper()}"))
    warps = config.pop("num_warps")
    kernel = getattr(module, f"{kind}_kernel")
    width = 128 // BITS[dtype]
    hardware = architecture >= (100 if name in ("nvfp4 rule", "nvfp4 search") else 89)
    known = dict(config, GIVEN=given, FUSED=True, CHUNK=32 * warps, WIDTH=width, HARDWARE=hardware)
    codes = "u8" if format == "mxfp8" else f"i{4 * width}" if kind == "expand" else "i64"
    types = {
        "x": f"*{dtype}",
        "out": f"*{dtype}",
        "outer_source": "*fp32" if given else "*i32",
        "coherence": "fp32",
        "codes": f"*{codes}",
        "table": "*i32",
        "block_scales": "*u8",
        "tensor_scale": "*fp32",
    }
    if dtype != "bf16":
        # The sieve is for bfloat16.
        del types["table"]
        known["table"] = None
    names = kernel.arg_names
    types, constants = ({n: v for n, v in table.items() if n in names} for table in (types, known))
    return compiled(kernel, architecture, types, constants, ones, warps), 32 * warps


def fused_operations(kernel, threads: int) -> int:
    """How many fused multiply-adds of a thread the source asks for."""
    shapes = re.findall(r"math\.fma .*? : (?:tensor<(\d+)xf32|f32)", kernel.asm["ttgir"])
    return sum(max(int(elements or 1) // threads, 1) for elements in shapes)


@compiles
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("architecture", [90, 100, 120])
def test_compiles_without_a_gpu(architecture: int, name: str, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, threads = compiled_kernel(name, architecture)
    ptx = kernel.asm["ptx"]
    # e2m1x2 exists for the architectures with the suffix a (or f) only.
    assert f".target sm_{architecture}a" in ptx
    has_e2m1 = architecture >= 100 and name in ("nvfp4 rule", "nvfp4 search")
    assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == has_e2m1
    assert CONVERSIONS.get(name, "") in ptx
    assert ("st" if "expand" in name else "ld") + ".global.v4.b32" in ptx, "16 bytes at a time"

    # Of approximations only what the correctly rounded reciprocal starts from; nothing for ptxas or LLVM to fuse.
    inexact = set(re.findall(r"div\.(?:full|approx)\S*|rcp\.approx\S*|\S+\.ftz\S*", ptx))
    assert inexact <= {"rcp.approx.ftz.f32"}, "instructions whose result is not that of the reference"
    assert not re.search(r"\b(?:add|sub|mul|mad)\.f32", ptx)
    # Blackwell has two in one.
    assert ptx.count("fma.rn.f32") + ptx.count("fma.rn.f32x2") == fused_operations(kernel, threads)

    usage = resource_usage(kernel, tmp_path)
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage


@compiles
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_every_specialization(name: str, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled_kernel(name, 80, "fp32", given=True)
    compiled_kernel(name, 120, "fp16", ones=True)


def test_reciprocals_and_the_sieve_give_the_bits_of_the_reference() -> None:
    pytest.importorskip("triton")
    environment = dict(os.environ, TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def exact_fma(a, b, c):
    """float32 of ``a*b + c`` with one rounding: the product is exact in float64, the sum is rounded to odd there."""
    import numpy as np

    with np.errstate(all="ignore"):
        product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        total = product + c
        rest = total - product
        error = (product - (total - rest)) + (c - rest)
        moves = (error != 0) & np.isfinite(total) & (total.view(np.int64) & 1 == 0)
        odd = np.where(moves, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
        return odd.astype(np.float32)


def lend_reciprocals() -> None:
    """Have the interpreter run what only a GPU runs."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from lrq_kernels.triton import nvfp4, quotient, sieve

    def create_fma(self, x, y, z):
        return TensorHandle(exact_fma(x.data, y.data, z.data), z.dtype.scalar)

    def reciprocal(divisor):
        return tl.div_rn(divisor * 0 + 1.0, divisor)

    InterpreterBuilder.create_fma = create_fma
    for module in (nvfp4, quotient, sieve):
        module.reciprocal = reciprocal
    nvfp4.FUSED = True


def count_blocks(size: tuple[int, int]) -> tuple[int, int]:
    """Blocks of a random matrix that the sieve does not serve, or of which more than one scale is left."""
    import torch

    from lrq_kernels import quantize_nvfp4, use_backend
    from lrq_kernels.triton import nvfp4_search

    found, sieve = [0, 0], nvfp4_search.sieve

    def spy(*args):
        result = sieve(*args)
        candidates, served = result[2].handle.data, result[5].handle.data.astype(bool)
        found[0] += int((~served).sum())
        found[1] += int(((candidates & (candidates - 1)) != 0)[served].sum())
        return result

    nvfp4_search.sieve = spy
    try:
        with use_backend("triton"):
            quantize_nvfp4(torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16(), None, 4.0)
    finally:
        nvfp4_search.sieve = sieve
    return found[0], found[1]


if __name__ == "__main__":
    import torch
    from test_bits import MOST_INTERPRETED, check

    torch.set_num_threads(1)
    lend_reciprocals()
    failures = check("quantize_nvfp4", "triton", "cpu", MOST_INTERPRETED)
    rest, several = count_blocks((128, 512))
    # Of 4096: for one of these a whole program works on.
    failures += [f"{rest} blocks are not served, {several} are in doubt"] if rest > 4 or several > 12 else []
    print("\n".join(failures))
    sys.exit(bool(failures))
