"""From a source file to a converted one, and from there into ComfyUI, for every format."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints import FLAGS, LAYERS, REFUSE_RAGGED, STOCK, convert, load, normal, run, same_bytes, save, transformer
from lrq import quantize, verify
from lrq.checkpoint.reader import Reader
from lrq.formats import read_format

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MODES = ("--simple", "--num_iter=20")


def check(source: Path, output: Path) -> None:
    result = verify(output, source)
    assert result.ok, result.failures
    assert all(math.isfinite(layer.error.frobenius) for layer in result.layers)


def dequantized(path: Path, layer: str, shape: tuple[int, ...]) -> Tensor:
    """What lrq says a stored layer stands for, float32."""
    file = load(path)
    found = {name.rpartition(".")[2]: t for name, t in file.tensors.items() if name.rpartition(".")[0] == layer}
    fmt = read_format(file.stated[layer], {suffix: tuple(tensor.shape) for suffix, tensor in found.items()})
    return fmt.dequantize(found, shape)


def as_comfyui_loads(path: Path, layer: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight as ComfyUI 0.33 builds it (ops.py, mixed_precision_ops): the header's marker decides."""
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    file = load(path)
    marker = file.stated[layer]
    weight, scale = file.tensors[f"{layer}.weight"], file.tensors[f"{layer}.weight_scale"]
    parts = {"orig_dtype": dtype, "orig_shape": shape, "scale": scale}
    if marker["format"] == "nvfp4":
        name = "TensorCoreNVFP4Layout"
        parts |= {"scale": file.tensors[f"{layer}.weight_scale_2"], "block_scale": scale}
    elif marker["format"] == "mxfp8":
        name, parts["scale"] = "TensorCoreMXFP8Layout", scale.view(torch.float8_e8m0fnu)
    elif marker["format"] == "int8_tensorwise":
        name = "TensorWiseINT8Layout"
        rotation = ("convrot", "convrot_groupsize")
        parts |= {key: marker[key] for key in rotation if key in marker}
    else:
        name = {"float8_e4m3fn": "TensorCoreFP8Layout"}[marker["format"]]
    return QuantizedTensor(weight, name, get_layout_class(name).Params(**parts)).dequantize()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FLAGS)
def test_the_real_model_converts_and_verifies(tmp_path, digits, name, mode):
    output = tmp_path / "out.safetensors"
    flags = [*FLAGS[name], "--exclude-layers", r"blocks\.[123]|fc"]
    assert run("convert", "-i", digits, "-o", output, mode, *flags).exit_code == 0
    check(digits, output)
    converted = load(output).stated.keys()
    assert converted == {"blocks.0.qkv", "blocks.0.proj"}
    for layer, tensor in load(digits).tensors.items():
        if layer.removesuffix(".weight") not in converted:
            assert same_bytes(load(output).tensors[layer], tensor)


SHAPES = ((1, 1), (1, 16), (1, 33), (16, 1), (3, 7), (33, 50), (48, 32), (130, 80))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FLAGS)
def test_every_shape_and_dtype(tmp_path, name, mode):
    tensors = {}
    for i, (rows, columns) in enumerate(SHAPES):
        for dtype in FLOATS:
            tensors[f"m{i}.{str(dtype)[6:]}.weight"] = normal(rows, columns, seed=i, dtype=dtype)
    source, output = save(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors"
    result = run("convert", "-i", source, "-o", output, mode, *FLAGS[name])
    assert result.exit_code == 0, result.output
    check(source, output)
    for layer, tensor in tensors.items():
        if layer.removesuffix(".weight") not in load(output).stated:
            assert name in REFUSE_RAGGED and same_bytes(load(output).tensors[layer], tensor)
            assert f"kept as it is  {layer}: " in result.stderr


SPECIAL = {
    "zeros": torch.zeros(16, 32),
    "negative zeros": -torch.zeros(16, 32),
    "a zero row": torch.cat([torch.zeros(1, 32), normal(15, 32)]),
    "a zero column": torch.cat([torch.zeros(16, 1), normal(16, 31)], 1),
    "one outlier": torch.cat([torch.full((1, 32), 1e4), normal(15, 32)]),
    "equal values": torch.full((16, 32), -0.3),
    "huge": normal(16, 32).clamp(-3, 3) * 4e29,
    "tiny": normal(16, 32) * 1e-37,
    "subnormal": normal(16, 32) * 1e-42,
    "rank one": normal(16, 1) * normal(1, 32),
    "identity": torch.eye(32),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FLAGS)
def test_awkward_values(tmp_path, name, mode):
    source = save(tmp_path / "in.safetensors", {f"{kind}.weight": w for kind, w in SPECIAL.items()})
    result = run("convert", "-i", source, "-o", tmp_path / "out.safetensors", mode, *FLAGS[name])
    assert result.exit_code == 0, result.output
    check(source, tmp_path / "out.safetensors")
    for zeros in ("zeros", "negative zeros"):
        assert not dequantized(tmp_path / "out.safetensors", zeros, (16, 32)).any()


@pytest.mark.parametrize("name", FLAGS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 99), st.sampled_from(FLOATS), st.booleans())
def test_any_small_layer(tmp_path, name, rows, columns, seed, dtype, simple):
    """Rows and columns are rounded where the format can't take every shape."""
    if name in REFUSE_RAGGED:
        rows, columns = 8 * rows, 16 * columns
    source = save(tmp_path / "in.safetensors", {"a.weight": normal(rows, columns, seed=seed, dtype=dtype)})
    flags = [*FLAGS[name], "--simple" if simple else "--num_iter=5"]
    assert run("convert", "-i", source, "-o", tmp_path / "out.safetensors", *flags).exit_code == 0
    check(source, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("shape", [(48, 32), (1, 16), (33, 64), (144, 272)])
def test_comfyui_reads_the_numbers_that_lrq_means(tmp_path, name, shape):
    source = save(tmp_path / "in.safetensors", {"a.weight": normal(*shape)})
    convert(source, tmp_path / "out", *FLAGS[name])
    meant = dequantized(tmp_path / "out", "a", shape)
    # ConvRot: the butterfly and ComfyUI's matrix product add in another order.
    slack = 1e-6 * meant.abs().max() if "convrot" in name else 0
    assert ((as_comfyui_loads(tmp_path / "out", "a", shape, torch.float32) - meant).abs() <= slack).all()
    # Scale, product of the scales and weight are each rounded to bfloat16.
    half = as_comfyui_loads(tmp_path / "out", "a", shape, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.shape == shape
    assert ((half.float() - meant).abs() <= slack + 3.1 * 2**-9 * meant.abs()).all()


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "mxfp8", "int8-row", "int8-row-convrot16"])
def test_comfyui_reads_ragged_layers(tmp_path, name):
    shape = (33, 80) if "convrot" in name else (33, 50)
    source = save(tmp_path / "in.safetensors", {"a.weight": normal(*shape, dtype=torch.bfloat16)})
    assert run("convert", "-i", source, "-o", tmp_path / "out", "--num_iter", "9", *FLAGS[name]).exit_code == 0
    loaded = as_comfyui_loads(tmp_path / "out", "a", shape, torch.float32)
    assert loaded.shape == shape
    torch.testing.assert_close(loaded, dequantized(tmp_path / "out", "a", shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FLAGS if "convrot" not in name])
def test_an_expert_bank_is_its_experts_stacked(tmp_path, name):
    experts = [normal(32, 48, seed=i) * (i + 1) for i in range(3)]
    tensors = {"blocks.0.experts.weight": torch.stack(experts)} | {f"m{i}.weight": w for i, w in enumerate(experts)}
    source = save(tmp_path / "in.safetensors", tensors)
    convert(source, tmp_path / "out", *FLAGS[name])
    check(source, tmp_path / "out")
    file = load(tmp_path / "out")
    for suffix in ("weight", "weight_scale", "weight_scale_2"):
        if f"m0.{suffix}" in file.tensors:
            bank, singles = (
                file.tensors[f"blocks.0.experts.{suffix}"],
                [file.tensors[f"m{i}.{suffix}"] for i in range(3)],
            )
            assert bank.shape == (3, *singles[0].shape)
            assert all(same_bytes(*pair) for pair in zip(bank, singles, strict=True))
    assert file.stated["blocks.0.experts"] == {**file.stated["m0"], "num_experts": 3}


def test_convrot_leaves_expert_banks_alone(tmp_path):
    tensors = {"experts.weight": normal(2, 16, 64), "a.weight": normal(16, 64)}
    source = save(tmp_path / "in.safetensors", tensors)
    words = convert(source, tmp_path / "out", *FLAGS["int8-row-convrot16"]).stderr
    assert "kept as it is  experts.weight: ComfyUI drops ConvRot from expert banks" in words
    assert same_bytes(load(tmp_path / "out").tensors["experts.weight"], tensors["experts.weight"])


@pytest.mark.parametrize("name", FLAGS)
def test_markers_agree_and_metadata_is_kept(tmp_path, name):
    stale = json.dumps({"format_version": "1.0", "layers": {LAYERS[0]: {"format": "stale"}, "gone": {"format": "x"}}})
    metadata = {"format": "pt", "modelspec.title": "größe\n", "_quantization_metadata": stale}
    source = save(tmp_path / "in.safetensors", transformer(), metadata)
    convert(source, tmp_path / "out", *FLAGS[name])
    file = load(tmp_path / "out")
    assert file.stated == file.marked and file.stated.keys() == set(LAYERS)
    assert json.loads(file.metadata["_quantization_metadata"])["format_version"] == "1.0"
    assert file.metadata["format"] == "pt" and file.metadata["modelspec.title"] == "größe\n"
    made = json.loads(file.metadata["lrq"])
    assert made["source"]["name"] == "in.safetensors" and made["source"]["size"] == source.stat().st_size
    assert made["settings"]["simple"] and made["settings"]["seed"] == 0 and made["version"]


@pytest.mark.parametrize("name", FLAGS)
def test_every_dtype_is_one_that_comfyui_reads(tmp_path, name):
    convert(save(tmp_path / "in", transformer()), tmp_path / "out", *FLAGS[name])
    with Reader(tmp_path / "out") as reader:
        written = {entry.dtype for entry in reader.header.entries}
    assert written <= {"I64", "F32", "BF16", "F8_E4M3", "I8", "U8"}


def test_a_source_that_is_quantized_already_stays_as_it_is(tmp_path):
    convert(save(tmp_path / "in", transformer()), tmp_path / "once", "--exclude-layers", "mlp")
    convert(tmp_path / "once", tmp_path / "twice", "--nvfp4")
    once, twice = load(tmp_path / "once"), load(tmp_path / "twice")
    assert {marker["format"] for marker in twice.stated.values()} == {"float8_e4m3fn", "nvfp4"}
    assert twice.stated == twice.marked and once.stated.items() <= twice.stated.items()
    for name, tensor in once.tensors.items():
        assert "mlp.fc" in name or same_bytes(tensor, twice.tensors[name])
    check_only = verify(tmp_path / "twice", tmp_path / "once")
    assert check_only.ok, check_only.failures


@pytest.mark.parametrize("name", ["nvfp4", "int8-row-convrot16"])
def test_simple_bytes_do_not_depend_on_threads(tmp_path, digits, name):
    one_layer = ("--simple", "--exclude-layers", r"blocks\.[123]|fc|qkv", *FLAGS[name])
    running = []
    for threads in ("1", "2"):
        command = [sys.executable, "-m", "lrq.cli", "convert", "-i", digits, "-o", tmp_path / threads, *one_layer]
        running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads}))
    assert [process.wait() for process in running] == [0, 0]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int8-row"])
def test_learned_bytes_are_the_same_twice_and_depend_on_nothing_but_the_layer(tmp_path, name):
    model = transformer()
    other = {**dict(reversed(model.items())), "zz.more.weight": normal(32, 32)}
    outputs = []
    for i, tensors in enumerate((model, model, other)):
        source = save(tmp_path / "in.safetensors", tensors)
        assert run("convert", "-i", source, "-o", tmp_path / str(i), *FLAGS[name]).exit_code == 0
        outputs.append(load(tmp_path / str(i)).tensors)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    for key, tensor in outputs[0].items():
        assert same_bytes(tensor, outputs[2][key])


def test_the_call_and_the_command_write_the_same_bytes(tmp_path):
    source = save(tmp_path / "in.safetensors", transformer())
    heard: list[str] = []
    summary = quantize(source, tmp_path / "a", nvfp4=True, simple=True, on_layer=lambda layer: heard.append(layer.name))
    convert(source, tmp_path / "b", "--nvfp4")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert set(heard) == set(LAYERS) and summary.output_size == (tmp_path / "a").stat().st_size


def test_a_quantized_source_with_the_header_entry_alone_verifies(tmp_path):
    convert(save(tmp_path / "in", transformer()), tmp_path / "both", "--exclude-layers", "mlp")
    both = load(tmp_path / "both")
    for name in [name for name in both.tensors if name.endswith(".comfy_quant")]:
        del both.tensors[name]
    convert(save(tmp_path / "once", both.tensors, both.metadata), tmp_path / "twice", "--nvfp4")
    assert both.stated.items() <= load(tmp_path / "twice").stated.items()
    report = verify(tmp_path / "twice", tmp_path / "once")
    assert report.ok, report.failures
