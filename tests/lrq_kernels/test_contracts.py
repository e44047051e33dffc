"""Contracts: custom ops that torch's own checker accepts, fake kernels that agree with real ones, refusals in words."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

import lrq_kernels
from lrq_kernels import OPERATIONS
from samples import gaussian, step_arguments

W = gaussian(40, 64)
BATCH = gaussian(2, 40, 64)

E4M3 = torch.ones(40, 64).to(torch.float8_e4m3fn)
NVFP4 = lrq_kernels.quantize_nvfp4(W)
MXFP8 = lrq_kernels.quantize_mxfp8(W)


def calls() -> dict[str, list[tuple]]:
    """Arguments for every operation, 2-D and batched."""
    found: dict[str, list[tuple]] = {name: [] for name in OPERATIONS}
    for x in (W, BATCH.bfloat16(), BATCH.half()):
        shape = x.shape[-2:]
        scale = torch.full(x.shape[:-2], 1e-4)
        found["amax"].append((x,))
        found["quantize_nvfp4"] += [(x,), (x, scale), (x, None, 4.0)]
        found["quantize_mxfp8"] += [(x,), (x, 4.0)]
        found["quantize_fp8"] += [(x,), (x, "tensor", 128, scale), (x, "row"), (x, "block", 8)]
        found["quantize_int8"] += [(x,), (x, "row"), (x, "block", 8), (x, "row", 0, None, 16)]
        found["rotate_hadamard"] += [(x, 4), (x, 64)]
        found["rounding_step"] += [
            step_arguments(x),
            step_arguments(x, "int8", (40, 64), torch.bfloat16, (False, True)),
        ]
        with lrq_kernels.use_backend("reference"):
            found["dequantize_nvfp4"].append((*lrq_kernels.quantize_nvfp4(x), *shape, torch.bfloat16))
            found["dequantize_mxfp8"].append((*lrq_kernels.quantize_mxfp8(x), *shape))
            found["dequantize_fp8"].append(lrq_kernels.quantize_fp8(x, "block", 8))
            found["dequantize_int8"].append((*lrq_kernels.quantize_int8(x, "row", 0, None, 16), 16, torch.float16))
    codes = torch.randint(0, 16, (2, 5, 8), dtype=torch.uint8)
    found["pack_fp4"] += [(codes,), (codes[0], False)]
    found["unpack_fp4"] += [(codes * 16 + 3,), (codes[0], False)]
    scales = torch.randint(0, 126, (2, 130, 6), dtype=torch.uint8)
    found["swizzle_scales"] += [(scales,), (scales[0].view(torch.float8_e4m3fn),)]
    found["unswizzle_scales"].append((lrq_kernels.swizzle_scales(scales), 130, 6))
    return found


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def step(position: int, wrong: object) -> object:
    """A step of rounding with one wrong argument."""
    arguments = list(step_arguments(W))
    arguments[position] = wrong
    return lrq_kernels.rounding_step(*arguments)


CASES = [(name, args) for name, several in calls().items() for args in several]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]


def test_every_operation_has_cases() -> None:
    assert {name for name, _ in CASES} == set(OPERATIONS)


@pytest.mark.parametrize(("name", "args"), CASES, ids=IDS)
def test_opcheck(name: str, args: tuple) -> None:
    assert getattr(lrq_kernels, name)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in args):
        checks.remove("test_schema")  # the checker multiplies its inputs, which torch can't do in float8
    torch.library.opcheck(getattr(torch.ops.lrq, name).default, args, test_utils=checks)


@pytest.mark.parametrize(("name", "args"), CASES, ids=IDS)
def test_inputs_are_left_alone(name: str, args: tuple) -> None:
    before = [bits(a).clone() for a in args if isinstance(a, torch.Tensor)]
    getattr(lrq_kernels, name)(*args)
    after = [bits(a) for a in args if isinstance(a, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("name", "args"), CASES, ids=IDS)
def test_meta_gives_the_real_layout(name: str, args: tuple) -> None:
    def layout(outputs: torch.Tensor | tuple) -> list:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [(o.dtype, o.shape, o.stride()) for o in outputs]

    operation = getattr(lrq_kernels, name)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    assert layout(operation(*meta)) == layout(operation(*args))


@pytest.mark.parametrize(("name", "args"), CASES, ids=IDS)
def test_a_batch_is_its_matrices(name: str, args: tuple) -> None:
    if args[0].dim() == 2:
        args = tuple(torch.stack([a, a.flip(0)]) if isinstance(a, torch.Tensor) and a.dim() else a for a in args)
        args = tuple(a.expand(2) if isinstance(a, torch.Tensor) and not a.dim() else a for a in args)
    operation = getattr(lrq_kernels, name)
    whole = operation(*args)
    for i in range(2):
        one = operation(*(a[i] if isinstance(a, torch.Tensor) else a for a in args))
        for a, b in zip(*((o if isinstance(o, tuple) else (o,)) for o in (whole, one)), strict=True):
            assert torch.equal(bits(a[i]), bits(b))


def test_strided_input_gives_the_same_bits() -> None:
    wide = gaussian(40, 128)
    for x in (wide[:, :64], wide.mT[:64, :].mT, wide[::2, 1:65]):
        for ours, dense in zip(lrq_kernels.quantize_nvfp4(x), lrq_kernels.quantize_nvfp4(x.contiguous()), strict=True):
            assert torch.equal(bits(ours), bits(dense))


def test_fullgraph_compile() -> None:
    def roundtrip(x: torch.Tensor) -> torch.Tensor:
        codes, block_scales, tensor_scale = lrq_kernels.quantize_nvfp4(x, None, 4.0)
        y = lrq_kernels.dequantize_nvfp4(codes, block_scales, tensor_scale, *x.shape)
        z = lrq_kernels.dequantize_mxfp8(*lrq_kernels.quantize_mxfp8(y), *x.shape)
        q, s = lrq_kernels.quantize_int8(z, "row", 0, None, 64)
        return lrq_kernels.dequantize_fp8(*lrq_kernels.quantize_fp8(lrq_kernels.dequantize_int8(q, s, 64))) * 2

    compiled = torch.compile(roundtrip, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(W), roundtrip(W))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: lrq_kernels.quantize_nvfp4(W.double()),
            "x: dtype must be one of float32, bfloat16, float16, got float64",
        ),
        (lambda: lrq_kernels.quantize_nvfp4(W[0]), r"x: shape must be \[M,N\] or \[B,M,N\], got \[64\]"),
        (lambda: lrq_kernels.quantize_mxfp8(W[:0]), "x: must not be empty"),
        (lambda: lrq_kernels.quantize_nvfp4(W, torch.ones(1)), r"tensor_scale: shape must be \[\], got \[1\]"),
        (lambda: lrq_kernels.quantize_nvfp4(W, None, -1.0), "coherence must be finite and not negative, got -1.0"),
        (lambda: lrq_kernels.quantize_fp8(W, "column"), "scaling must be one of tensor, row, block, got 'column'"),
        (lambda: lrq_kernels.quantize_int8(W, "block", 128), "multiples of the block 128, got 40 x 64"),
        (
            lambda: lrq_kernels.quantize_fp8(W, "row", 0, torch.ones(())),
            "scale can be given with scaling 'tensor' only",
        ),
        (lambda: lrq_kernels.rotate_hadamard(W, 8), "group must be a power of 4 .* got 8"),
        (lambda: lrq_kernels.rotate_hadamard(W, 256), "columns must be a multiple of the Hadamard group 256, got 64"),
        (lambda: lrq_kernels.pack_fp4(torch.zeros(2, 3, dtype=torch.uint8)), "N must be even, got 3"),
        (lambda: lrq_kernels.unswizzle_scales(torch.zeros(128, 4, dtype=torch.uint8), 129, 4), "take shape .256, 4."),
        (lambda: step(12, "fp4"), "grid must be one of e2m1, e4m3, int8, got 'fp4'"),
        (lambda: step(3, 0), "block_rows and block_columns must be positive, got 0 and 16"),
        (lambda: step(2, torch.ones(40, 3)), r"scale: shape must be \[40, 4\], got \[40, 3\]"),
        (lambda: step(1, W), "values: dtype must be bfloat16, got torch.float32"),
        (lambda: step(9, torch.ones((), device="meta")), "share: must be on cpu, is on meta"),
        (lambda: lrq_kernels.dequantize_int8(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4)), "scale: float32 by"),
        (lambda: lrq_kernels.bind("quantize_nvfp4", W, 1.0), "tensor_scale: must be a torch.Tensor, got float"),
        (lambda: lrq_kernels.bind("dequantize_fp8", E4M3, None), "scale: must be a torch.Tensor, got NoneType"),
        (
            lambda: lrq_kernels.bind("dequantize_nvfp4", *NVFP4[:2], None, 40, 64),
            "tensor_scale: must be a torch.Tensor",
        ),
        (lambda: lrq_kernels.quantize_nvfp4(BATCH, torch.ones(2).to_sparse()), "tensor_scale: must be a dense tensor"),
        (lambda: step(5, None), "gradient: must be a torch.Tensor, got NoneType"),
        (lambda: step(2, None), "scale: must be a torch.Tensor, got NoneType"),
        (lambda: lrq_kernels.dequantize_nvfp4(*NVFP4, -40, 64), "rows and columns must be positive, got -40 and 64"),
        (lambda: lrq_kernels.dequantize_mxfp8(*MXFP8, 40, 0), "rows and columns must be positive, got 40 and 0"),
        (lambda: lrq_kernels.quantize_fp8(W, "block", 0), "block must be positive, got 0"),
    ],
)
def test_refusals_say_what_and_where(call, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        call()
    # One line, which begins with the operation.
    assert re.match(rf"({'|'.join(OPERATIONS)}): .*$", str(caught.value)), caught.value


def test_a_parameter_gives_plain_tensors() -> None:
    for backend in ("reference", None):
        with lrq_kernels.use_backend(backend) if backend else contextlib.nullcontext():
            for output in lrq_kernels.quantize_nvfp4(torch.nn.Parameter(torch.randn(16, 32))):
                assert not output.requires_grad


@pytest.mark.parametrize("coherence", [float("nan"), float("inf"), -1.0])
def test_coherence_is_a_finite_number(coherence: float) -> None:
    for quantize in (lrq_kernels.quantize_mxfp8, lambda x, c: lrq_kernels.quantize_nvfp4(x, None, c)):
        with pytest.raises(ValueError, match="coherence must be finite"):
            quantize(torch.randn(32, 32), coherence)


def test_a_given_scale_lies_with_the_matrix() -> None:
    x, scale = torch.randn(16, 32), torch.ones((), device="meta")
    calls = (lrq_kernels.quantize_fp8, lrq_kernels.quantize_int8)
    for call in (*(lambda f=f: f(x, scale=scale) for f in calls), lambda: lrq_kernels.quantize_nvfp4(x, scale)):
        with pytest.raises(ValueError, match="scale: must be on cpu, is on meta"):
            call()


def test_explain_fills_in_defaults() -> None:
    assert "chosen" in lrq_kernels.explain("quantize_nvfp4", torch.randn(4, 16)).values()


def test_scales_lie_beside_the_codes() -> None:
    codes, scale = lrq_kernels.quantize_int8(torch.ones(16, 16), "row")
    with pytest.raises(ValueError, match="scale: must be on cpu, is on meta"):
        lrq_kernels.dequantize_int8(codes, scale.to("meta"))
    codes, block_scales, tensor_scale = lrq_kernels.quantize_nvfp4(torch.ones(16, 16))
    with pytest.raises(ValueError, match="block_scales: must be on cpu, is on meta"):
        lrq_kernels.dequantize_nvfp4(codes, block_scales.to("meta"), tensor_scale, 16, 16)


@pytest.mark.parametrize("x", [None, torch.eye(4).to_sparse()])
def test_what_is_no_dense_tensor_is_named(x) -> None:
    with pytest.raises(TypeError, match="x: must be a"):
        lrq_kernels.quantize_nvfp4(x)
