"""What test_bits.py can't ask of the Triton kernels: that they compile for absent GPUs, and to what."""

import inspect
import itertools
import os
import re
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


ALIGNED = frozenset({"x", "codes", "block_scales", "batch_stride", "row_stride", "columns"})


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
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compiled_quantize(architecture, search)
    ptx = kernel.asm["ptx"]
    # e2m1x2 exists for the architectures with the suffix a (or f) only.
    assert f".target sm_{architecture}a" in ptx
    assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == (architecture >= 100)
    inexact = re.findall(r"fma\.\S*f32|div\.(?:full|approx)\S*|rcp\.approx\S*|\S+\.ftz\S*", ptx)
    assert not inexact, "instructions whose result is not that of the reference"

    usage = resource_usage(kernel, tmp_path)
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage


def resource_usage(kernel, folder: Path) -> str:
    """What cuobjdump says of registers and spills."""
    triton = pytest.importorskip("triton")
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("no cuobjdump: spills unknown")
    return subprocess.run([cuobjdump, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True).stdout


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
