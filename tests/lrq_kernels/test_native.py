"""What the list of inputs in test_bits.py can't ask of the C++ and CUDA kernels: threads, streams, large offsets."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrq_kernels import (
    dequantize_fp8,
    dequantize_int8,
    dequantize_mxfp8,
    dequantize_nvfp4,
    explain,
    quantize_fp8,
    quantize_int8,
    quantize_mxfp8,
    quantize_nvfp4,
    use_backend,
)
from samples import gaussian

pytest.importorskip("lrq_kernels.native", reason="the native extension is not built", exc_type=ImportError)

QUANTIZE = {"nvfp4": lambda x, coherence: quantize_nvfp4(x, None, coherence), "mxfp8": quantize_mxfp8}


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def _equal(found, expected) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", QUANTIZE)
def test_threads_do_not_change_bits(name, threads):
    x = gaussian(3, 70, 96)
    with use_backend("reference"):
        expected = QUANTIZE[name](x, 4.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend("cpu"):
            found = QUANTIZE[name](x, 4.0)
    finally:
        torch.set_num_threads(before)
    # The tensor scale has no dimension to view as bytes.
    assert _equal([t.reshape(-1) for t in found], [t.reshape(-1) for t in expected])


def test_says_why_not():
    reasons = explain("quantize_nvfp4", torch.zeros(16, 16, device="meta"), None, None)
    assert reasons["cpu"] == "takes tensors on the CPU, got one on meta"
    reasons = explain("quantize_nvfp4", torch.zeros(16, 16), None, None)
    assert reasons["cuda"] in ("takes tensors on CUDA, got one on cpu", "this build has no CUDA part")
    assert reasons["cpu"] in ("chosen", "accepts")


@pytest.mark.gpu
@pytest.mark.parametrize("coherence", [None, 4.0])
@pytest.mark.parametrize("name", QUANTIZE)
def test_follows_the_current_stream(name, coherence):
    _need_cuda()
    x = gaussian(1024, 1024).cuda()
    with use_backend("reference"):
        expected = QUANTIZE[name](x + 1, coherence)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), use_backend("cuda"):
        torch.cuda._sleep(10_000_000)
        found = QUANTIZE[name](x + 1, coherence)
    stream.synchronize()
    assert _equal([t.reshape(-1) for t in found], [t.reshape(-1) for t in expected])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 2080, 4096), (9000, 4096), (70, 100, 512)])
@pytest.mark.parametrize("name", ["nvfp4", "fp8", "int8"])
def test_scales_from_the_amax_of_large_matrices(name, shape, dtype):
    """Matrices that thread blocks share, and more matrices than that."""
    _need_cuda()
    x = gaussian(*shape).to(dtype).cuda() * torch.logspace(-3, 0, shape[-2], device="cuda")[:, None].to(dtype)
    quantize = {"nvfp4": quantize_nvfp4, "fp8": quantize_fp8, "int8": quantize_int8}[name]
    with use_backend("reference"):
        expected = quantize(x)
    with use_backend("cuda"):
        for _ in range(3):
            found = quantize(x)
            assert _equal([t.reshape(-1) for t in found], [t.reshape(-1) for t in expected])


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_kernels_in_a_row_wait_for_each_other(scaling):
    """Kernels may begin before the one ends whose results they read."""
    _need_cuda()

    def rounds(x):
        for _ in range(12):
            x = dequantize_int8(*quantize_int8(x, scaling), 0, torch.bfloat16)
            x = dequantize_fp8(*quantize_fp8(x, scaling), torch.bfloat16)
            x = dequantize_nvfp4(*quantize_nvfp4(x), *x.shape, torch.bfloat16)
        return x

    x = gaussian(2048, 2048).bfloat16().cuda()
    with use_backend("reference"):
        expected = rounds(x)
    with use_backend("cuda"):
        rounds(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = rounds(x)
    for _ in range(5):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)


@pytest.fixture
def beyond_32_bits():
    """A bfloat16 matrix of more than 2^31 elements, zero but for its last row."""
    _need_cuda()
    rows, columns = 1 << 16, (1 << 15) + 32
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    x = torch.zeros((rows, columns), dtype=torch.bfloat16, device="cuda")
    x[-1] = gaussian(columns).cuda()
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUANTIZE)
def test_quantizes_beyond_32_bit_offsets(beyond_32_bits, name):
    with use_backend("cuda"):
        codes, scales, *_ = QUANTIZE[name](beyond_32_bits, None)
        last_codes, last_scales, *_ = QUANTIZE[name](beyond_32_bits[-128:], None)
    codes = codes.view(torch.uint8)
    assert torch.equal(codes[-128:], last_codes.view(torch.uint8)) and not codes[:-128].any()
    tail = last_scales.numel()
    assert torch.equal(scales.view(torch.uint8).reshape(-1)[-tail:], last_scales.view(torch.uint8).reshape(-1))


@pytest.mark.gpu
def test_dequantizes_beyond_32_bit_offsets(beyond_32_bits):
    with use_backend("cuda"):
        found = dequantize_mxfp8(*quantize_mxfp8(beyond_32_bits), *beyond_32_bits.shape, torch.bfloat16)
        last = dequantize_mxfp8(*quantize_mxfp8(beyond_32_bits[-32:]), 32, found.shape[1], torch.bfloat16)
    assert torch.equal(found[-32:], last) and last[-1].any() and not found[:-1].any()


FEW_THREADS = """
import resource, torch, lrq_kernels
x = torch.arange(4096 * 64.).view(4096, 64)
lrq_kernels.amax(x)
torch.set_num_threads(64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20,) * 2)
with lrq_kernels.use_backend("cpu"):
    print(lrq_kernels.amax(x).item())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="not Linux")
def test_goes_on_with_the_threads_it_gets():
    """There is room for the stacks of a few threads only."""
    done = subprocess.run([sys.executable, "-c", FEW_THREADS], capture_output=True, text=True)
    assert done.stdout.strip() == "262143.0", done.stderr


def test_a_nan_is_kept_whatever_follows_it():
    x = gaussian(64, 64)
    x[1, 2] = float("nan")
    with use_backend("cpu"):
        _, _, tensor_scale = quantize_nvfp4(x)
    assert tensor_scale.isnan()


def test_cuda_refuses_what_its_kernels_would():
    """Before the call, so that another backend takes it; asked without CUDA, so the limits are asked first."""
    from lrq_kernels.native import amax, fp8, hadamard, int8, nvfp4

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    few, scale = empty(2, 4096), empty()
    large = empty(2**20, 2**14)
    for reason in (
        hadamard.cuda_refusal(few, 4096),
        int8.cuda_refusal(few, "row", 0, None, 4096),
        int8.cuda_refusal_back(few, scale, 4096, torch.float32),
    ):
        assert reason == "the Hadamard group must be at most 1024, got 4096"
    assert nvfp4.cuda_refusal(empty(65536, 1, 16), None, None) == "at most 65535 matrices, got 65536"
    for reason in (
        amax.cuda_refusal(large),
        nvfp4.cuda_refusal(large, None, None),
        fp8.cuda_refusal(large, "tensor", 0, None),
        int8.cuda_refusal(large, "tensor", 0, None, 16),
        fp8.cuda_refusal_back(large, scale, torch.float32),
        int8.cuda_refusal_back(large, scale, 0, torch.float32),
    ):
        assert reason == "matrix too large for one launch: [1048576, 16384]"
    assert "takes tensors on CUDA" in fp8.cuda_refusal(large, "row", 0, None)
    assert "takes tensors on CUDA" in hadamard.cuda_refusal(few, 1024)
