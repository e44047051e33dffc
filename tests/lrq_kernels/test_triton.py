"""The Triton kernels give the bits of the reference: interpreted on the CPU, compiled for absent GPUs, run on a GPU.

``TRITON_INTERPRET`` counts when triton is imported, so this file run as a script is the interpreted half.
"""

import inspect
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lrq_kernels

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COHERENCES = (None, 0.0, 4.0)
SHAPES = ((1, 1), (1, 16), (33, 50), (128, 256), (2, 40, 48))
GIVEN_SCALES = (1.0, 1e-45, 3e38)
MORE_SCALES = (0.37, 1e-3, 1e-30, 1e30)

interpreting = os.environ.get("TRITON_INTERPRET") == "1"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiles = pytest.mark.skipif(interpreting, reason="TRITON_INTERPRET is set: nothing compiles")


def special() -> Tensor:
    """Ties of both grids, signed zeros, zero blocks, subnormals, extremes, wide ranges in a block; float32 [24,48]."""
    generator = torch.Generator().manual_seed(1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    around = torch.cat([torch.nextafter(ties, ties.new_tensor(limit)) for limit in (0.0, 7.0)])
    x = torch.randn(24, 48, generator=generator)
    x[0, :16] = torch.cat([ties, -ties])
    x[0, 16:32] = around
    x[0, 32:48] = -around
    x[1] = 0.0
    x[2, :16] = -0.0
    x[2, 16:32] = torch.tensor([-0.0, 6.0] * 8)
    x[3] = torch.arange(48) * 2.0**-149
    x[4] = torch.arange(48) * -(2.0**-130)
    x[5] *= 1e38
    x[6] = torch.tensor([3.4e38, -3.4e38, 1e-38, 0.0] * 12)
    x[7] = 10.0 ** torch.linspace(-45, 38, 48)
    x[8] = 10.0 ** torch.linspace(-4, 2, 48)
    x[9] = 2.0 ** torch.arange(-24, 24)
    # amax/6 halfway between two E4M3 values, normal and subnormal
    x[10] = torch.tensor([1.0625, 1.1875, 2.0**-9 * 1.5]).mul(6).repeat_interleave(16) * torch.linspace(-1, 1, 48)
    x[10, ::16] = torch.tensor([1.0625, 1.1875, 2.0**-9 * 1.5]) * 6
    x[11] = torch.tensor([1e-6] * 15 + [1.0]).repeat(3)
    x[12] = 6 * torch.randint(-1, 2, (48,), generator=generator)
    x[13:16] *= 10.0 ** torch.linspace(-40, 30, 3)[:, None]
    x[16:] = torch.randint(-24, 25, (8, 48), generator=generator) * 0.25
    return x


def inputs(
    shapes: tuple[tuple[int, ...], ...] = SHAPES, scales: tuple[float, ...] = GIVEN_SCALES
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, x and tensor scale; x not always contiguous."""
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in itertools.product(shapes, DTYPES):
        x = torch.randn(shape, generator=generator)
        yield f"normal {shape} {dtype}", x.to(dtype), None
    wide = torch.randn(37, 90, generator=generator)
    yield "row stride", wide[:, 5:70], None
    yield "transposed", wide.T, torch.tensor(0.01)
    yield "batch of slices", wide[:36].view(2, 18, 90)[:, 2:, :33], None
    yield "zeros", torch.zeros(17, 20), None
    yield "tiny", torch.tensor([[2.0**-149]]), None
    yield "batch scales", torch.randn(3, 5, 40, generator=generator), torch.tensor([0.01, 1e-4, 0.3])
    for dtype in DTYPES:
        limit = torch.finfo(dtype).max
        yield f"special {dtype}", special().clamp(-limit, limit).to(dtype), None
    for scale in scales:
        yield f"special, scale {scale}", special(), torch.tensor(scale)
    # Their start is a subnormal E4M3 scale, which has not doubled 8 codes further: its bound says nothing of that one.
    subnormal = [
        [-15, 25, 20, -25, -10, 25, 20, -5, 20, -5, -20, -15, 0, -20, -10, -15],
        [20, -20, -8, -12, -20, -20, -20, 20, 24, -4, -24, 0, -20, -8, 12, 4],
    ]
    yield "subnormal scales", torch.tensor(subnormal) * 2.0**-9, torch.tensor(1.0)
    for row in (3, 4, 8):
        yield f"special row {row}", special()[row, None], None


def mismatches(x: Tensor, scale: Tensor | None, coherence: float | None) -> list[str]:
    """Names of the outputs whose bytes differ from the reference."""
    with lrq_kernels.use_backend("reference"):
        expected = lrq_kernels.quantize_nvfp4(x, scale, coherence)
    with lrq_kernels.use_backend("triton"):
        found = lrq_kernels.quantize_nvfp4(x, scale, coherence)
    return [
        name
        for name, a, b in zip(("codes", "block_scales", "tensor_scale"), expected, found, strict=True)
        if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    ]


def interpret() -> None:
    """Compare every input in the interpreter; exits with the list of what differs."""
    from lrq_kernels.triton import nvfp4

    wrong, shipped = [], nvfp4._SEARCH
    for (name, x, scale), coherence in itertools.product(inputs(), COHERENCES):
        # The interpreter pays by the program: the shipped tile is for the small ones.
        nvfp4._SEARCH = shipped if x.numel() < 64 or name == "zeros" else {**shipped, "ROWS": 128}
        different = mismatches(x, scale, coherence)
        wrong += [f"{name}, coherence {coherence}: {', '.join(different)}"] if different else []
    sys.exit("\n".join(wrong) or None)


def test_interpreted_bits() -> None:
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_order_of_the_sum() -> None:
    pytest.importorskip("triton")
    from lrq_kernels.reference.arithmetic import tree_sum
    from lrq_kernels.triton import arithmetic

    x = torch.randn(10000, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(arithmetic.tree_sum.fn(x.unbind(-1)), tree_sum(x))


@compiles
def test_refuses_cpu_tensors() -> None:
    pytest.importorskip("triton")
    assert "TRITON_INTERPRET" in lrq_kernels.explain("quantize_nvfp4", torch.ones(1, 16), None, None)["triton"]


def compiled(kernel, architecture: int, pointers: dict[str, str], constants: dict[str, int], ones: bool, warps: int):
    """``kernel`` for an absent GPU; ``ones``: as launched where every integer is 1, else aligned to 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    if ones:
        constants = {name: 1 for name in names if name not in pointers} | constants
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = () if ones else set(names) & {"x", "codes", "block_scales", "batch_stride", "row_stride", "columns"}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )


def compiled_quantize(architecture: int, search: bool, dtype: str = "bf16", given: bool = False, ones: bool = False):
    """The quantize kernel as it is launched on ``architecture``."""
    from lrq_kernels.triton import nvfp4

    config = dict(nvfp4._SEARCH if search else nvfp4._RULE)
    warps = config.pop("num_warps")
    constants = {**config, "GIVEN": given, "SEARCH": search, "HARDWARE": architecture >= 100}
    types = {
        "x": f"*{dtype}",
        "outer_source": "*fp32" if given else "*i32",
        "coherence": "fp32",
        "codes": "*i64",
        "block_scales": "*u8",
        "tensor_scale": "*fp32",
    }
    return compiled(nvfp4.quantize_kernel, architecture, types, constants, ones, warps)


@compiles
@pytest.mark.parametrize("search", [False, True], ids=["rule", "search"])
@pytest.mark.parametrize("architecture", [90, 100, 120])
def test_compiles_without_a_gpu(architecture: int, search: bool, tmp_path: Path, monkeypatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compiled_quantize(architecture, search)
    ptx = kernel.asm["ptx"]
    # e2m1x2 exists for the architectures with the suffix a (or f) only.
    assert f".target sm_{architecture}a" in ptx
    assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == (architecture >= 100)
    inexact = re.findall(r"fma\.\S*f32|div\.(?:full|approx)\S*|rcp\.approx\S*|\S+\.ftz\S*", ptx)
    assert not inexact, "instructions whose result is not that of the reference"

    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("no cuobjdump: spills unknown")
    usage = subprocess.run([cuobjdump, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True).stdout
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage


@compiles
@pytest.mark.parametrize("search", [False, True], ids=["rule", "search"])
def test_compiles_every_specialization(search: bool, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    from lrq_kernels.triton.amax import amax_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for dtype, given, ones in itertools.product(("fp32", "fp16"), (False, True), (False, True)):
        compiled_quantize(120, search, dtype, given, ones)
    for dtype, ones in itertools.product(("fp32", "bf16", "fp16"), (False, True)):
        types = {"x": f"*{dtype}", "bits": "*i32"}
        compiled(amax_kernel, 90, types, {"ROWS": 16, "COLUMNS": 256}, ones, warps=8)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("coherence", COHERENCES)
def test_gpu_bits(coherence: float | None) -> None:
    pytest.importorskip("triton")
    shapes = (*SHAPES, (129, 1000), (3072, 3072))
    wrong = []
    for name, x, scale in inputs(shapes, GIVEN_SCALES + MORE_SCALES):
        different = mismatches(x.cuda(), None if scale is None else scale.cuda(), coherence)
        wrong += [f"{name}: {', '.join(different)}"] if different else []
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    interpret()
