"""What test_bits.py can't ask of the Triton kernels: that they compile for absent GPUs, and to what."""

import inspect
import os
import subprocess
from pathlib import Path

import pytest
import torch

import lrq_kernels

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
