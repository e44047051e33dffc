"""A good file passes; a file with one thing wrong fails, and the failure names it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from damage import RAGGED, drop, failures, poke, replace, restate

from checkpoints import FLAGS, by_hand, convert, load, normal, run, same_bytes, save, tampered
from lrq import quantize, verify
from lrq.formats import read_format


@pytest.mark.parametrize("name", FLAGS)
def test_a_good_file_passes_with_and_without_its_source(good, source, name):
    assert verify(good(name), source).failures == verify(good(name)).failures == []


KEPT = {
    "a bit of a kept tensor": (replace("bias", poke((17,), 9)), "tensor square.bias: its bytes differ"),
    "a kept tensor cast": (replace("weight", torch.Tensor.float, "norm"), "norm.weight: was BF16 [64], is F32 [64]"),
    "a kept tensor reshaped": (
        replace("weight", lambda t: t[None], "norm"),
        "norm.weight: was BF16 [64], is BF16 [1, 64]",
    ),
    "a tensor missing": (drop("norm.weight"), "tensor norm.weight: is missing"),
    "a tensor more": (lambda file: file.tensors.update(extra=torch.ones(1)), "tensor extra: is not in the source"),
    "both markers missing": (
        lambda file: (drop("twin.comfy_quant")(file), restate(lambda f: {k: f[k] for k in f if k != "twin"})(file)),
        "layer twin: has a scale but no marker",
    ),
    "no entry in the header": (lambda file: file.metadata.pop("_quantization_metadata"), "is missing from one of"),
    "a broken entry": (lambda file: file.metadata.update(_quantization_metadata="[" * 99_999), "is not a JSON object"),
    "a marker of nothing": (restate(lambda layers: {**layers, "ghost": {"format": "nvfp4"}}), "layer ghost: "),
}


@pytest.mark.parametrize("wrong", KEPT)
def test_what_is_not_quantized_must_be_the_source(good, source, wrong):
    change, words = KEPT[wrong]
    found = failures(tampered(good("nvfp4"), change), source)
    assert any(words in line for line in found), found


def test_another_source_is_noticed(good, source, tmp_path):
    changed = {**RAGGED, "square.weight": normal(64, 64, seed=9)}
    found = failures(good("nvfp4"), save(tmp_path / "same-header.safetensors", changed, {"format": "pt"}))
    assert found and all(line.startswith("layer square: nvfp4: relative error 1.4") for line in found)
    (other,) = failures(good("nvfp4"), save(tmp_path / "other.safetensors", {**RAGGED, "more": torch.ones(1)}))
    assert "made from another source" in other and f"from {source.name} of {source.stat().st_size} bytes" in other


def test_a_file_that_loaders_cannot_map_is_noticed(good, tmp_path):
    file = load(good("int8-tensor"))
    codes = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
    table, data = {"__metadata__": file.metadata}, b""
    for name in sorted(file.tensors, key=lambda name: file.tensors[name].element_size()):
        begin, tensor = len(data), file.tensors[name]
        data += bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        table[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, len(data)]}
    header = json.dumps(table).encode()
    place = 8 + len(header) + table["square.weight_scale"]["data_offsets"][0]
    path = tmp_path / "unaligned.safetensors"
    path.write_bytes(by_hand(header + b" " * ((1 - place) % 4), data))
    assert any("square.weight_scale: starts at an offset" in line for line in failures(path))


def test_the_source_is_no_converted_file(source):
    assert failures(source) == ["no layer is quantized: the file has no marker"]


@pytest.mark.parametrize(
    ("shape", "seed", "flags"), [((1, 3), 280, ["--mxfp8"]), ((16, 2), 7, ["--nvfp4", "--coherence", "1000"])]
)
def test_a_scale_search_that_gave_up_plain_error_is_no_failure(tmp_path, shape, seed, flags):
    """What the coherence asks for may cost more than the limit: in a block or two, or because it is large."""
    source = save(tmp_path / "in.safetensors", {"a.weight": normal(*shape, seed=seed)})
    convert(source, tmp_path / "out.safetensors", *flags)
    result = verify(tmp_path / "out.safetensors", source)
    assert result.ok and result.layers[0].error.frobenius_ratio > 1.5


@pytest.mark.parametrize("name", ["fp8", "int8-row-convrot16", "nvfp4"])
def test_the_errors_are_those_of_the_definition(good, source, name):
    result = verify(good(name), source)
    file = load(good(name))
    sums = torch.zeros(2, dtype=torch.float64)
    for layer in result.layers:
        w = RAGGED[f"{layer.name}.weight"].double()
        stored = {key.rpartition(".")[2]: t for key, t in file.tensors.items() if key.startswith(f"{layer.name}.")}
        fmt = read_format(file.stated[layer.name], {key: tuple(tensor.shape) for key, tensor in stored.items()})
        error = fmt.dequantize(stored, tuple(w.shape)).double() - w
        k = min(max(int(0.4 * min(w.shape)), 64), min(w.shape))
        directions = torch.linalg.svd(w, full_matrices=False).Vh[:k].mT
        assert layer.error.frobenius == pytest.approx((error.norm() / w.norm()).item(), rel=1e-9)
        assert layer.error.projected_error == pytest.approx(((error @ directions).norm() / w.norm()).item(), rel=1e-6)
        assert layer.error.sqnr == pytest.approx(20 * math.log10(w.norm() / error.norm()), rel=1e-6)
        sums += torch.stack([error.square().sum(), w.square().sum()])
    assert result.total.frobenius == pytest.approx((sums[0] / sums[1]).sqrt().item(), rel=1e-9)
    assert result.total.frobenius_ratio == pytest.approx(1) or name == "nvfp4"


def test_what_loaders_would_misread_fails(good, source):
    layer = next(iter(json.loads(load(good("nvfp4")).metadata["_quantization_metadata"])["layers"]))

    def zero_scale(file):
        file.tensors[f"{layer}.weight_scale_2"] *= 0

    def wide_code(file):
        file.tensors[f"{layer}.weight"].view(-1)[0] = -128

    def flat_marker(file):
        file.tensors[f"{layer}.comfy_quant"] = file.tensors[f"{layer}.comfy_quant"][None]

    assert f"layer {layer}: weight_scale_2 is zero" in failures(tampered(good("nvfp4"), zero_scale), source)
    assert any("code -128" in line for line in failures(tampered(good("int8-row"), wide_code), source))
    assert any("must be U8 in one dimension" in line for line in failures(tampered(good("fp8"), flat_marker), source))


def test_the_metadata_of_the_source_must_be_there(good, source):
    bad = tampered(good("mxfp8"), lambda file: file.metadata.pop("format"))
    assert failures(bad, source) == ["header: the source's metadata format is missing or differs"]


def test_a_marker_of_a_layer_that_came_quantized_must_be_the_sources(good, tmp_path):
    file = load(good("int8-row"))
    second = save(tmp_path / "in.safetensors", {**file.tensors, "blocks.9.fc.weight": normal(32, 64)}, file.metadata)
    assert run("convert", "-i", second, "-o", tmp_path / "out.safetensors", "--nvfp4", "--simple").exit_code == 0
    assert verify(tmp_path / "out.safetensors", second).ok
    layer = next(iter(json.loads(file.metadata["_quantization_metadata"])["layers"]))

    def rotated(file):
        table = json.loads(file.metadata["_quantization_metadata"])
        table["layers"][layer] |= {"convrot": True, "convrot_groupsize": 64}
        file.metadata["_quantization_metadata"] = json.dumps(table)

    bad = tampered(tmp_path / "out.safetensors", rotated)
    assert any(f"layer {layer}: came quantized, and its entry" in line for line in failures(bad, second))


def test_scales_that_follow_the_codes_are_verified(tmp_path):
    source = save(tmp_path / "in", {"a.weight": normal(64, 128), "b.weight": normal(64, 128)})
    flags = {"nvfp4": True, "projection": "both", "plain_weight": 1.0, "scale_rounds": 2}
    quantize(source, tmp_path / "out", **flags, device="cpu")
    quantize(source, tmp_path / "fixed", **{**flags, "scale_rounds": 0}, device="cpu")
    result = verify(tmp_path / "out", source)
    assert result.ok, result.failures
    assert not same_bytes(*(load(tmp_path / name).tensors["a.weight_scale"] for name in ("out", "fixed")))
