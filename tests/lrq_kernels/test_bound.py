"""Operations tied to their tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import lrq_kernels
from lrq_kernels import dispatch

W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def test_follows_its_input() -> None:
    w = torch.randn(32, 48)
    quantize = lrq_kernels.bind("quantize_nvfp4", w, coherence=4.0)
    assert quantize.backend == dispatch.choose("quantize_nvfp4", (w, None, 4.0))
    for seed in range(2):
        w.copy_(torch.randn(32, 48, generator=torch.Generator().manual_seed(seed)))
        memory = [t.data_ptr() for t in quantize.outputs]
        found, expected = quantize(), lrq_kernels.quantize_nvfp4(w, coherence=4.0)
        assert [t.data_ptr() for t in found] == memory
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    with pytest.raises(ValueError, match="coherence must be finite and not negative"):
        lrq_kernels.bind("quantize_nvfp4", w, coherence=-1.0)
    with pytest.raises(ValueError, match="does not exist"):
        lrq_kernels.bind("quantise", w)


def test_refuses_pending_signs() -> None:
    """Kernels read memory, where the sign is not."""
    codes = torch.ones(4, 4, dtype=torch.int8)
    imaginary = torch.randn(16, 64, dtype=torch.complex64).conj().imag
    for name, arguments in {
        "quantize_int8": (imaginary,),
        "rotate_hadamard": (torch._neg_view(W), 4),
        "dequantize_int8": (codes, torch._neg_view(torch.ones(()))),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: (x|scale): a view with a pending negation can't be bound"):
            lrq_kernels.bind(name, *arguments)


def test_refuses_fake_tensors() -> None:
    real = W.clone()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for x in (torch.empty(16, 64), real):
            with pytest.raises(TypeError, match="a FakeTensor has no memory to bind"):
                lrq_kernels.bind("quantize_nvfp4", x)


@pytest.mark.parametrize("name", ["quantize_nvfp4", "quantize_mxfp8", "quantize_fp8", "quantize_int8", "amax"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_outputs_require_no_gradient(name: str, backend: str) -> None:
    parameter = torch.nn.Parameter(W.clone())
    if dispatch.refusal(name, backend, (parameter,) if name == "amax" else (parameter, None)) is not None:
        pytest.skip(f"no {backend} backend")
    with lrq_kernels.use_backend(backend):
        outputs = lrq_kernels.bind(name, parameter)()
    assert not any(x.requires_grad for x in (outputs if isinstance(outputs, tuple) else (outputs,)))


def test_other_memory_is_followed_and_another_shape_refused() -> None:
    parameter = torch.nn.Parameter(W.clone())
    largest = lrq_kernels.bind("amax", parameter)
    parameter.data = 2 * W
    assert largest() == 2 * W.abs().max()
    for other in (torch.ones(4096, 4096), W.bfloat16()):
        changed = torch.nn.Parameter(W.clone())
        largest = lrq_kernels.bind("amax", changed)
        changed.data = other
        with pytest.raises(RuntimeError, match=r"^amax: x was bound as float32 \[16, 64\] on cpu, is .*: bind again$"):
            largest()


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ((), {}, "quantize_nvfp4: missing a required argument: 'x'"),
        ((W, None, None, 3), {}, "quantize_nvfp4: too many positional arguments"),
        ((W,), {"gamma": 3}, "quantize_nvfp4: got an unexpected keyword argument 'gamma'"),
    ],
)
def test_wrong_arguments_name_the_operation(arguments: tuple, settings: dict, words: str) -> None:
    with pytest.raises(TypeError, match=f"^{words}$"):
        lrq_kernels.bind("quantize_nvfp4", *arguments, **settings)
