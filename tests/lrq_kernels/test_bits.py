"""Every kernel of every backend gives the reference's bits, on one list of inputs.

``TRITON_INTERPRET`` counts when triton is imported, so this file run as a script, with the name of an operation, is
the interpreted half.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lrq_kernels
from lrq_kernels import OPERATIONS, dispatch
from lrq_kernels.dispatch import refusal

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS))

import tolerances  # noqa: E402
from samples import FLOATS, MATRICES, NEAREST, every_bfloat16, gaussian, step_arguments  # noqa: E402

Args = tuple[object, ...]
COHERENCES = (None, 0.0, 4.0)
MOST_INTERPRETED = 2048
"""Elements of an input of Triton's interpreter, which is slow; the sweep of all bfloat16 values comes on top."""


SWEEPS = ("every bfloat16, None", "every bfloat16, tensor", "every bfloat16, row")


def inputs() -> Iterator[tuple[str, Tensor]]:
    """Samples of correctness, and views of them."""
    yield from MATRICES.items()
    wide = gaussian(4, 50, 130)
    yield "row stride", wide[0, 1:, 1:]
    yield "every second row", wide[1, ::2, :64]
    yield "batch of slices", wide[..., 3:67]
    yield "transposed", wide[2].T
    yield "swapped batch", wide.transpose(0, 1)
    yield "one row", wide[3, :1].expand(20, -1)
    yield "every bfloat16", every_bfloat16()
    for dtype in FLOATS[1:]:
        for name in ("ties", "outlier blocks", "tiny"):
            yield f"{name} {dtype}", MATRICES[name].to(dtype)


INPUTS = dict(inputs())


def by_scaling(quantize: str) -> Iterator[tuple[str, Args]]:
    for name, x in INPUTS.items():
        yield f"{name}, tensor", (x, "tensor", 0, None)
        yield f"{name}, row", (x, "row", 0, None)
        for block in (16, 10, 1):
            if x.shape[-1] % block == 0 and x.shape[-2] % block == 0:
                yield f"{name}, block {block}", (x, "block", block, None)
                break
        yield f"{name}, given", (x, "tensor", 0, torch.full(x.shape[:-2], 3e-4))
    yield "block 128", (gaussian(256, 384), "block", 128, None)
    yield "batch of blocks", (gaussian(2, 96, 64), "block", 32, None)
    yield "tiny given", (gaussian(16, 48), "tensor", 0, torch.tensor(1e-40))
    yield "expanded given", (gaussian(3, 16, 48), "tensor", 0, torch.tensor(0.01).expand(3))


def dequantized(quantize: str, cases: Iterator[tuple[str, Args]], after: Callable) -> Iterator[tuple[str, Args]]:
    for i, (name, args) in enumerate(cases):
        with dispatch.use_backend("reference"):
            outputs = getattr(lrq_kernels, quantize)(*args)
        yield f"{name}", after(args, outputs, FLOATS[i % 3])


def cases(operation: str) -> Iterator[tuple[str, Args]]:
    """Inputs of an operation, named."""
    if operation in ("quantize_nvfp4", "quantize_mxfp8"):
        given = (None,) if operation == "quantize_nvfp4" else ()
        for name, x in INPUTS.items():
            for coherence in COHERENCES:
                yield f"{name}, {coherence}", (x, *given, coherence)
        if given:
            for scale in (1e-45, 1e-38, 1e-3, 0.37, 1e4, 3e38):
                for coherence in (None, 4.0):
                    yield f"given {scale:g}, {coherence}", (gaussian(40, 72), torch.tensor(scale), coherence)
            # The last mantissa is the one whose quotients take a division each; by powers of two there are exact ties.
            for scale in (1 - 2**-24, 2.0**-5):
                yield f"given {scale}, 4.0", (MATRICES["ties"] / 7, torch.tensor(scale), 4.0)
                yield f"given {scale}, bfloat16, 4.0", (gaussian(40, 72).bfloat16(), torch.tensor(scale), 4.0)
            # Their start is a subnormal E4M3 scale, which has not doubled 8 codes further: it bounds nothing.
            subnormal = [
                [-15, 25, 20, -25, -10, 25, 20, -5, 20, -5, -20, -15, 0, -20, -10, -15],
                [20, -20, -8, -12, -20, -20, -20, 20, 24, -4, -24, 0, -20, -8, 12, 4],
            ]
            for coherence in COHERENCES:
                yield f"subnormal scales, {coherence}", (torch.tensor(subnormal) / 512, torch.tensor(1.0), coherence)
            yield "given, batch", (gaussian(3, 40, 48), torch.tensor([1e-3, 0.5, 7.0]), 4.0)
    elif operation == "quantize_fp8":
        yield from by_scaling(operation)
    elif operation == "quantize_int8":
        for name, args in by_scaling(operation):
            yield name, (*args, 0)
        yield from int8_rotated()
    elif operation == "rotate_hadamard":
        for dtype in FLOATS:
            for group in (4, 16, 64, 256, 1024):
                yield f"group {group} {dtype}", (gaussian(3, 7, 2048).to(dtype), group)
        yield "strided", (gaussian(40, 300)[::3, 9:265], 64)
        yield "extremes", (MATRICES["outlier blocks"], 64)
    elif operation == "rounding_step":
        yield from steps()
    elif operation == "amax":
        for name, x in INPUTS.items():
            yield name, (x,)
        yield "nan", (torch.tensor([[1.0, float("nan")], [-3.0, 2.0]]),)
        yield "infinite", (torch.tensor([[1.0, float("-inf")], [-3.0, 2.0]]).bfloat16(),)
    elif operation == "dequantize_nvfp4":
        yield from dequantized("quantize_nvfp4", cases("quantize_nvfp4"), lambda a, o, d: (*o, *a[0].shape[-2:], d))
        codes = torch.arange(256, dtype=torch.uint8).repeat(16, 1)
        scales = torch.arange(256, dtype=torch.uint8).repeat(128 * 32 // 256, 1).view(torch.float8_e4m3fn)
        yield "every code", (codes, scales.reshape(128, 32), torch.tensor(0.37), 16, 512, torch.float32)
    elif operation == "dequantize_mxfp8":
        yield from dequantized("quantize_mxfp8", cases("quantize_mxfp8"), lambda a, o, d: (*o, *a[0].shape[-2:], d))
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(32, 1)
        scales = (torch.arange(128 * 8) % 255).to(torch.uint8).view(128, 8)
        yield "every code", (codes, scales, 32, 256, torch.float32)
    elif operation == "dequantize_fp8":
        yield from dequantized("quantize_fp8", cases("quantize_fp8"), lambda a, o, d: (*o, d))
    elif operation == "dequantize_int8":
        yield from dequantized("quantize_int8", cases("quantize_int8"), lambda a, o, d: (*o, a[4], d))
    elif operation in ("pack_fp4", "unpack_fp4"):
        for shape in ((1, 2), (3, 34), (64, 96), (2, 17, 128)):
            codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
            for high_first in (True, False):
                yield f"{shape} {high_first}", (codes, high_first)
        yield "strided", (codes[:, ::2, 2:66], True)
    elif operation == "swizzle_scales":
        for shape in ((1, 1), (33, 5), (128, 4), (300, 70), (2, 130, 9)):
            scales = torch.randint(0, 255, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
            yield f"{shape}", (scales,)
            yield f"{shape} e4m3", (scales.view(torch.float8_e4m3fn),)
    else:
        assert operation == "unswizzle_scales", operation
        for _, (scales,) in cases("swizzle_scales"):
            with dispatch.use_backend("reference"):
                swizzled = lrq_kernels.swizzle_scales(scales)
            yield f"{scales.shape} {scales.dtype}", (swizzled, *scales.shape[-2:])


def int8_rotated() -> Iterator[tuple[str, Args]]:
    for dtype in FLOATS:
        for group in (4, 64, 256):
            yield f"rotated {group} {dtype}", (gaussian(37, 512).to(dtype), "row", 0, None, group)
    yield "rotated 1024", (gaussian(9, 2048), "row", 0, None, 1024)
    yield "rotated batch", (gaussian(2, 9, 256), "row", 0, None, 64)
    yield "rotated tensor", (gaussian(9, 256), "tensor", 0, None, 64)
    yield "rotated given", (gaussian(9, 256), "tensor", 0, torch.tensor(1e-3), 64)
    yield "rotated block", (gaussian(64, 256), "block", 32, None, 64)
    yield "rotated strided", (gaussian(40, 300)[::3, 9:265], "row", 0, None, 64)
    yield "rotated extremes", (MATRICES["outlier blocks"], "row", 0, None, 16)


def steps() -> Iterator[tuple[str, Args]]:
    """Every grid and type, scales of rows, matrices and of blocks that end within a vector or beyond the matrix."""
    blocks = {"e2m1": (1, 16), "e4m3": (7, 10), "int8": (1, 1000)}
    for grid in NEAREST:
        for name, x in INPUTS.items():
            if name != "every bfloat16":
                yield f"{name}, {grid}", step_arguments(x, grid, blocks[grid])
        for share in (0.0, 1.0):
            yield f"share {share} {grid}", step_arguments(gaussian(30, 64), grid, (30, 64), share=share)
        yield f"bfloat16 gradient {grid}", step_arguments(gaussian(2, 20, 48).half(), grid, (1, 16), torch.bfloat16)
        yield f"rows alone {grid}", step_arguments(gaussian(3, 5, 40), grid, (5, 40), curvatures=(True, False))
        yield f"columns alone {grid}", step_arguments(gaussian(3, 5, 40), grid, (2, 8), curvatures=(False, True))
    yield "no curvature", step_arguments(gaussian(3, 5, 40), curvatures=(False, False), plain_weight=0.0)
    for shape in ((1, 2048), (3, 100, 1024), (70, 3072), (9, 2500)):
        yield f"parts of {shape}", step_arguments(gaussian(*shape).bfloat16(), "e4m3", (1, 32), torch.bfloat16)
    arguments = list(step_arguments(gaussian(30, 64), share=1.0))
    arguments[2] = torch.zeros_like(arguments[2])
    yield "zero scales", tuple(arguments)


def run(operation: str, backend: str, args: Args, device: str) -> tuple[Tensor, ...]:
    """Outputs of a kernel that found its memory dirty."""
    moved = on(device, args)
    meta = on("meta", args)
    layout = getattr(lrq_kernels, operation)(*meta)
    layout = layout if isinstance(layout, tuple) else (layout,)
    outputs = tuple(torch.empty(t.shape, dtype=t.dtype, device=device) for t in layout)
    for output in outputs:
        output.reshape(-1).view(torch.uint8).fill_(0xA5)
    with dispatch.use_backend(backend):
        dispatch.call(operation, moved, outputs)
    return outputs


def difference(operation: str, backend: str, args: Args, device: str = "cpu") -> str:
    """Empty, or which output differs from the reference, and in how many bytes."""
    expected = run(operation, "reference", args, "cpu")
    found = run(operation, backend, args, device)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b = (t.cpu().contiguous().reshape(-1) for t in (a, b))
        if (operation, backend, i) == ("rounding_step", "triton", 2) and torch.allclose(
            a, b, rtol=tolerances.TRITON_SUMS, atol=0, equal_nan=True
        ):
            continue
        # A NaN is a NaN, whatever its payload.
        wrong = (a.view(torch.uint8) != b.view(torch.uint8)).view(len(a), -1).any(1)
        if a.is_floating_point():
            wrong &= ~(a.float().isnan() & b.float().isnan())
        if wrong.any():
            return f"output {i}: {int(wrong.sum())} of {len(a)} elements differ"
    return ""


def check(operation: str, backend: str, device: str, most: float = float("inf")) -> list[str]:
    """Where the backend differs from the reference, on inputs of at most so many elements."""
    chosen = [
        (name, args)
        for name, args in cases(operation)
        if (args[0].numel() <= most or name in SWEEPS) and (refusal(operation, backend, on(device, args)) is None)
    ]
    assert chosen
    compared = ((name, difference(operation, backend, args, device)) for name, args in chosen)
    return [f"{name}: {found}" for name, found in compared if found]


def on(device: str, args: Args) -> Args:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


def refused(operation: str, backend: str, device: str) -> str | None:
    """Why the backend takes none of the inputs, or None if it takes some."""
    reasons = {refusal(operation, backend, on(device, args)) for _, args in cases(operation)}
    return None if None in reasons else str(next(iter(reasons)))


def skip_if_refused(operation: str, backend: str, device: str) -> None:
    reason = refused(operation, backend, device)
    if reason is not None:
        pytest.skip(f"{operation} on {backend}: {reason}")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_native_cpu(operation: str) -> None:
    skip_if_refused(operation, "cpu", "cpu")
    failures = check(operation, "cpu", "cpu")
    assert not failures, "\n".join(failures)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gpu(operation: str, backend: str) -> None:
    skip_if_refused(operation, backend, "cuda")
    failures = check(operation, backend, "cuda")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_triton_interpreted(operation: str) -> None:
    pytest.importorskip("triton")
    environment = dict(os.environ, TRITON_INTERPRET="1")
    command = [sys.executable, __file__, operation]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "refused" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    name = sys.argv[1]
    reason = refused(name, "triton", "cpu")
    if reason is not None:
        sys.exit(print(f"refused: {reason}"))
    failures = check(name, "triton", "cpu", MOST_INTERPRETED)
    print("\n".join(failures))
    sys.exit(bool(failures))
