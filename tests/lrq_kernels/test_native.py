"""The C++ and CUDA kernels give the reference's bits."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lrq_kernels import dispatch, explain, quantize_nvfp4, use_backend

pytest.importorskip("lrq_kernels.native", reason="the native extension is not built", exc_type=ImportError)

CSRC = Path(__file__).parents[2] / "csrc"
COHERENCES = (None, 0.0, 4.0, 30.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 16), (33, 50), (128, 256), (3, 40, 48))


def _cuda_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    return request.param if request.param == "cpu" else _cuda_device()


def gaussian(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def every_bfloat16():
    bits = torch.arange(1 << 16, dtype=torch.int32)
    values = bits[(bits & 0x7F80) != 0x7F80].to(torch.int16).view(torch.bfloat16)
    return values.reshape(-1, 80)


def ties(scale=1.0):
    return (torch.arange(-32, 32) * 0.25 * scale).repeat(16, 1)


def with_block(value, shape=(32, 64)):
    x = gaussian(shape)
    x[0, :16] = 0
    x[1, 16:32] = value
    return x


def outlier():
    x = torch.full((16, 64), 1e-3)
    x[3, 17] = -5.0
    return x


EXTREMES = {
    "every_bfloat16": every_bfloat16(),
    "bfloat16_below_8": every_bfloat16()[every_bfloat16().abs().amax(-1) < 8],
    "ties": ties(),
    "ties_of_third": ties(1 / 3),
    "subnormals": gaussian((32, 64)) * 1e-39,
    "mixed_subnormals": gaussian((32, 64)) * torch.logspace(-45, 0, 32)[:, None],
    "huge": gaussian((32, 64)).clamp(-1, 1) * 3e38,
    "below_normal": gaussian((32, 64)) * 1e-38,
    "smallest": torch.full((16, 32), 1e-44),
    "zero": torch.zeros(20, 40),
    "negative_zero": -torch.zeros(20, 40),
    "zero_block": with_block(0.0),
    "negligible_block": with_block(-1e-30),
    "outlier": outlier(),
    "heavy_tails": gaussian((64, 128)) / gaussian((64, 128), seed=1),
    "half_subnormals": gaussian((32, 64), torch.float16) * 1e-6,
}


def run(backend, x, given, coherence):
    """Outputs of a kernel that found its memory dirty."""
    inputs = (x, given, coherence)
    shapes = quantize_nvfp4(x.to("meta"), None if given is None else given.to("meta"), coherence)
    outputs = tuple(torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in shapes)
    for output in outputs:
        output.reshape(-1).view(torch.uint8).fill_(0xA5)
    with use_backend(backend):
        dispatch.call("quantize_nvfp4", inputs, outputs)
    return outputs


def check(backend, x, coherence, given=None):
    expected = run("reference", x, given, coherence)
    found = run(backend, x.to(backend), None if given is None else given.to(backend), coherence)
    for name, a, b in zip(("codes", "block_scales", "tensor_scale"), found, expected, strict=True):
        wrong = (a.cpu().reshape(-1).view(torch.uint8) != b.reshape(-1).view(torch.uint8)).sum().item()
        assert wrong == 0, f"{name}: {wrong} of {b.nbytes} bytes differ"


@pytest.mark.parametrize("coherence", COHERENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gaussian(backend, shape, dtype, coherence):
    check(backend, gaussian(shape, dtype), coherence)


@pytest.mark.parametrize("coherence", [None, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles(backend, dtype, coherence):
    check(backend, gaussian((300, 384), dtype), coherence)


@pytest.mark.parametrize("coherence", COHERENCES)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(backend, name, coherence):
    check(backend, EXTREMES[name], coherence)


@pytest.mark.parametrize("coherence", COHERENCES)
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-6, 1e-3, 0.37, 1.0, 1e4, 1e36, 3e38])
def test_given_scale(backend, scale, coherence):
    check(backend, gaussian((40, 72)), coherence, torch.tensor(scale))
    check(backend, EXTREMES["mixed_subnormals"], coherence, torch.tensor(scale))


@pytest.mark.parametrize("coherence", [None, 4.0])
def test_given_scale_of_a_batch(backend, coherence):
    x = gaussian((3, 40, 48))
    check(backend, x, coherence, torch.tensor([1e-3, 0.5, 7.0]))
    check(backend, x, coherence, torch.tensor(0.01).expand(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coherence", [None, 4.0])
def test_views(backend, dtype, coherence):
    x = gaussian((4, 50, 130), dtype).to(backend)
    views = (
        x[0, 1:, 1:],
        x[1, ::2, :64],
        x[..., 3:40],
        x[2].T,
        x.transpose(0, 1),
        x[:1, :1, :1],
        x[0, :1].expand(20, -1),
    )
    for view in views:
        with use_backend(backend):
            found = quantize_nvfp4(view, None, coherence)
            expected = quantize_nvfp4(view.clone(memory_format=torch.contiguous_format), None, coherence)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        check(backend, view.cpu(), coherence)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_bits(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check("cpu", gaussian((3, 70, 96)), 4.0)
    finally:
        torch.set_num_threads(before)


def test_says_why_not():
    reasons = explain("quantize_nvfp4", torch.zeros(16, 16, device="meta"), None, None)
    assert reasons["cpu"] == "takes tensors on the CPU, got one on meta"
    reasons = explain("quantize_nvfp4", torch.zeros(16, 16), None, None)
    assert reasons["cuda"] in ("takes tensors on CUDA, got one on cpu", "this build has no CUDA part")
    assert reasons["cpu"] in ("chosen", "accepts")


@pytest.mark.gpu
@pytest.mark.parametrize("coherence", [None, 4.0])
def test_follows_the_current_stream(coherence):
    _cuda_device()
    x = gaussian((1024, 1024)).cuda()
    with use_backend("reference"):
        expected = quantize_nvfp4(x + 1, None, coherence)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), use_backend("cuda"):
        torch.cuda._sleep(10_000_000)
        found = quantize_nvfp4(x + 1, None, coherence)
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.gpu
def test_beyond_32_bit_offsets():
    _cuda_device()
    rows, columns = 1 << 16, (1 << 15) + 16
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GiB of GPU memory")
    x = torch.zeros((rows, columns), dtype=torch.bfloat16, device="cuda")
    x[-1] = gaussian((columns,), torch.bfloat16).cuda()
    with use_backend("cuda"):
        codes, scales, tensor_scale = quantize_nvfp4(x)
        last = quantize_nvfp4(x[-128:])
    assert torch.equal(codes[-128:], last[0]) and not codes[:-128].any()
    tail = last[1].numel()
    assert torch.equal(scales.view(torch.uint8).reshape(-1)[-tail:], last[1].view(torch.uint8).reshape(-1))
    assert torch.equal(tensor_scale, last[2])


@pytest.mark.parametrize("arch, has_instruction", [("90a", False), ("100f", True), ("120f", True)])
def test_compiles_without_spills(tmp_path, arch, has_instruction):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-cubin", "-keep", f"-keep-dir={tmp_path}", "-Xptxas=-v"]
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    source = str(CSRC / "cuda" / "nvfp4.cu")
    built = subprocess.run([*command, target, "-o", tmp_path / "nvfp4.cubin", source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ptx = next(tmp_path.glob("*.ptx")).read_text()
    assert ("cvt.rn.satfinite.e2m1x2" in ptx) == has_instruction
    assert "fma.rn" not in ptx
    spills = re.findall(r"(\d+) bytes spill stores", built.stdout + built.stderr)
    assert spills and set(spills) == {"0"}
