"""Cut into tiles or not, read ahead or not, on the CPU or a GPU: the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import FLAGS, normal, save
from lrq import quantize
from lrq.errors import InputError
from lrq.execution import Execution
from lrq.formats import FORMATS
from lrq.staging import memory
from lrq.staging.process import give_back_workspaces

TENSORS = {
    "blocks.0.ragged.weight": normal(300, 80, seed=1).bfloat16(),
    "blocks.0.even.weight": normal(256, 64, seed=2),
    "blocks.1.double.weight": normal(272, 48, seed=3, dtype=torch.float64),
    "blocks.1.experts.weight": normal(5, 48, 64, seed=4).half(),
    "blocks.1.bias": normal(256, seed=5),
}
SETTINGS = {
    "fp8": {},
    "fp8-row": {"scaling_mode": "row"},
    "fp8-block": {"scaling_mode": "block", "block_size": 16},
    "int8-tensor": {"int8": True},
    "int8-row": {"int8": True, "scaling_mode": "row"},
    "int8-block": {"int8": True, "block_size": 16},
    "int8-row-convrot": {"int8": True, "scaling_mode": "row", "convrot": True, "convrot_group_size": 16},
    "nvfp4": {"nvfp4": True},
    "mxfp8": {"mxfp8": True},
}


@pytest.fixture
def source(tmp_path) -> Path:
    return save(tmp_path / "in.safetensors", TENSORS)


@pytest.fixture
def cut_to(monkeypatch):
    """Let so many bytes be left for layers, whatever the process takes."""
    monkeypatch.setattr(memory, "CPU_TILE", 1 << 40)

    def set_left(left: int, smallest: int = 0) -> None:
        monkeypatch.setattr(memory, "_room", lambda *_: memory._Room("--max_ram", left, left))
        monkeypatch.setattr("lrq.staging.tiles.SMALL", smallest)

    return set_left


def test_every_format_is_here():
    assert SETTINGS.keys() == FORMATS.keys() and len(SETTINGS) == len(FLAGS)


def converted(source: Path, name: str, execution: Execution | None = None, **settings: object) -> bytes:
    output = source.with_name(f"{name}.safetensors")
    quantize(source, output, execution=execution, simple=True, **settings)
    return output.read_bytes()


@pytest.mark.parametrize("name", SETTINGS)
def test_tiles_of_any_size_give_the_same_bytes(source, cut_to, name, monkeypatch):
    settings = SETTINGS[name]
    whole = converted(source, "whole", **settings)
    tiles = []
    real = memory._tiles
    monkeypatch.setattr(memory, "_tiles", lambda *args: (tiles.append(real(*args)), tiles[-1])[1])
    counts = []
    for left in (100_000, 150_000, 250_000):
        cut_to(left)
        tiles.clear()
        for execution in (Execution(), Execution(low_memory=True)):
            assert converted(source, f"{left}", execution, **settings) == whole
        counts.append(sum(map(len, tiles)))
    assert counts[0] > counts[-1] >= 8


def test_models_of_a_file_are_cut_in_its_order(tmp_path, cut_to):
    """The float32 of a text encoder comes first in a file, its model last among those that are decided on."""
    tensors = {
        "model.diffusion_model.blocks.0.attn.weight": (0.01 * normal(256, 64, seed=1)).bfloat16(),
        "text_encoders.x.blocks.0.q.weight": normal(512, 64, seed=2),
    }
    source = save(tmp_path / "in.safetensors", tensors)
    whole = converted(source, "whole", nvfp4=True, preset="none")
    cut_to(100_000)
    assert converted(source, "tiles", nvfp4=True, preset="none") == whole


def test_experts_are_cut_for_learned_rounding_too(source, cut_to):
    def learned(name: str) -> bytes:
        output = source.with_name(name)
        quantize(source, output, nvfp4=True, num_iter=2, exclude_layers="ragged|even|double")
        return output.read_bytes()

    whole = learned("whole")
    cut_to(400_000)
    assert learned("tiles") == whole


def test_a_matrix_of_learned_rounding_is_never_cut(source, cut_to):
    cut_to(100_000)
    with pytest.raises(InputError, match=r"layer blocks\.0\.ragged \[300, 80\]: needs [\d.]+ MB, --max_ram"):
        quantize(source, source.with_name("out"), nvfp4=True)


def test_a_value_that_is_not_finite_is_found_in_any_tile(source, cut_to):
    broken = {**TENSORS, "blocks.0.even.weight": TENSORS["blocks.0.even.weight"].clone()}
    broken["blocks.0.even.weight"][255, 63] = torch.nan
    save(source, broken)
    cut_to(100_000)
    for settings in ({}, {"mxfp8": True}):
        with pytest.raises(InputError, match=r"blocks\.0\.even\.weight holds NaN or Inf"):
            quantize(source, source.with_name("out"), simple=True, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "execution", [Execution(), Execution(low_memory=True), Execution(max_vram="auto"), Execution(max_vram="80MB")]
)
def test_a_gpu_gives_the_bytes_of_the_cpu(source, name, execution):
    settings = SETTINGS[name]
    on_cpu = converted(source, "cpu", device="cpu", **settings)
    assert converted(source, "cuda", execution, device="cuda", **settings) == on_cpu


@pytest.mark.gpu
def test_tiles_on_a_gpu_give_the_same_bytes_within_the_bound(tmp_path):
    tensors = {f"blocks.{i}.fc.weight": normal(4096, 4096, seed=i).bfloat16() for i in range(6)}
    source = save(tmp_path / "in.safetensors", tensors)
    on_cpu = converted(source, "cpu", device="cpu", nvfp4=True)
    quantize(source, tmp_path / "out", nvfp4=True, simple=True, device="cuda", execution=Execution(max_vram="120MB"))
    assert (tmp_path / "out").read_bytes() == on_cpu
    assert torch.cuda.max_memory_reserved() <= 120e6


@pytest.mark.gpu
def test_a_gpu_too_small_is_an_error_that_names_layer_need_and_flag(tmp_path, monkeypatch):
    tensors = {f"blocks.{i}.fc.weight": normal(4096, 4096, seed=i).bfloat16() for i in range(6)}
    source = save(tmp_path / "in.safetensors", tensors)
    give_back_workspaces(torch.device("cuda"))
    free = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(40e6 / free)
    try:
        with pytest.raises(InputError, match=r"layer blocks\..*out of memory of the GPU; it needs .*--max_vram auto"):
            quantize(source, tmp_path / "out", nvfp4=True, simple=True, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
