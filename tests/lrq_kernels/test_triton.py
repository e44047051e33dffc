"""What test_bits.py can't ask of the Triton kernels: that they compile for absent GPUs, and to what."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lrq_kernels
from lrq_kernels import dispatch

interpreting = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(interpreting, reason="TRITON_INTERPRET is set: nothing compiles")


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


ALIGNED = frozenset({"x", "codes", "block_scales", "out", "batch_stride", "row_stride", "columns"})


def compiled(
    kernel,
    architecture: int,
    pointers: dict[str, str],
    constants: dict[str, int],
    ones: bool,
    warps: int,
    multiples: frozenset[str] = ALIGNED,
):
    """``kernel`` for an absent GPU; ``ones``: as launched where every integer is 1, else ``multiples`` are of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    if ones:
        constants = {name: 1 for name in names if name not in pointers} | constants
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = () if ones else (set(names) & multiples) - set(constants)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )


def resource_usage(kernel, folder: Path) -> str:
    """What cuobjdump says of registers and spills."""
    triton = pytest.importorskip("triton")
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("no cuobjdump: spills unknown")
    return subprocess.run([cuobjdump, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("shape", [(1, 2**31 + 8), (2**31, 1), (2, 4, 2**31 - 1)])
def test_refuses_what_32_bits_do_not_count(shape: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    for name in ("amax", "quantize_nvfp4", "quantize_fp8"):
        arguments = {"quantize_nvfp4": (None, None), "quantize_fp8": ("row", 0, None)}.get(name, ())
        reason = dispatch.refusal(name, "triton", (torch.empty(shape, device="meta"), *arguments))
        assert reason and "rows and columns, got" in reason
    codes = torch.empty(16, 2**30, dtype=torch.uint8, device="meta")
    reason = dispatch.refusal("dequantize_nvfp4", "triton", (codes, codes, codes, 16, 2**31, torch.float32))
    assert reason and "got 16 x 2147483648" in reason


MISALIGNED = """
import numpy, torch, lrq_kernels
torch.set_num_threads(1)

def placed(x, offset, ahead):
    buffer = torch.from_numpy(numpy.zeros(x.numel() + 64, numpy.uint8)[ahead:])
    moved = buffer[offset:][: x.numel()].view(x.shape)
    return moved.copy_(x)

codes, *scales = lrq_kernels.quantize_nvfp4(torch.randn(16, 64))
for ahead, offset in ((0, 1), (0, 2), (1, 0), (3, 1), (1, 3), (4, 4)):
    moved = placed(codes, offset, ahead)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(*(lrq_kernels.dequantize_nvfp4(c, *scales, 16, 64, dtype) for c in (codes, moved)))
    assert torch.equal(*map(lrq_kernels.unpack_fp4, (codes, moved)))
    assert torch.equal(*map(lrq_kernels.pack_fp4, (codes, moved)))
    assert torch.equal(*map(lrq_kernels.swizzle_scales, (codes, moved)))
"""


def test_codes_may_start_anywhere() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LRQ_BACKEND": "triton"}
    done = subprocess.run([sys.executable, "-c", MISALIGNED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
