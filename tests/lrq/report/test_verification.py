"""A good file passes; a file with one thing wrong fails, and the failure names it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lrq_kernels
from checkpoints import FLAGS, File, by_hand, convert, load, normal, run, save, tampered
from lrq import verify
from lrq.formats import read_format

SOURCE = {
    "square.weight": normal(64, 64),
    "square.bias": normal(64, seed=1),
    "twin.weight": normal(64, 64, seed=2),
    "tile.weight": normal(128, 128, seed=3),
    "norm.weight": normal(64, seed=4).bfloat16(),
}
RAGGED = {**SOURCE, "ragged.weight": normal(33, 50, seed=5)}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("source") / "in.safetensors", RAGGED, {"format": "pt"})


@pytest.fixture(scope="module")
def good(source) -> Callable[[str], Path]:
    """The source in a format, converted once."""

    def path(name: str) -> Path:
        target = source.with_name(f"{name}.safetensors")
        if not target.exists():
            convert(source, target, *FLAGS[name])
        return target

    return path


def failures(path: Path, source: Path | None = None) -> list[str]:
    result = run("verify", path, *([] if source is None else ["--source", source]))
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert all(line.startswith("failed: ") for line in lines[:20])
    return [line.removeprefix("failed: ") for line in lines]


@pytest.mark.parametrize("name", FLAGS)
def test_a_good_file_passes_with_and_without_its_source(good, source, name):
    assert verify(good(name), source).failures == verify(good(name)).failures == []


def replace(
    suffix: str, change: Callable[[torch.Tensor], torch.Tensor], layer: str = "square"
) -> Callable[[File], None]:
    def apply(file: File) -> None:
        file.tensors[f"{layer}.{suffix}"] = change(file.tensors[f"{layer}.{suffix}"])

    return apply


def drop(*names: str) -> Callable[[File], None]:
    def apply(file: File) -> None:
        for name in names:
            del file.tensors[name]

    return apply


def remark(**keys: object) -> Callable[[File], None]:
    """Change keys of both markers of a layer; None drops one."""

    def apply(file: File) -> None:
        changed = {**file.stated["square"], **keys}
        file.mark("square", {key: value for key, value in changed.items() if value is not None})

    return apply


def restate(layers: Callable[[dict], dict]) -> Callable[[File], None]:
    """Change marker B only."""

    def apply(file: File) -> None:
        file.metadata["_quantization_metadata"] = json.dumps({"layers": layers(file.stated)})

    return apply


def poke(index: tuple[int, ...], value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set one byte of a matrix of bytes."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone().view(torch.uint8)
        changed[index] = value
        return changed.view(tensor.dtype)

    return apply


def unswizzled(scales: torch.Tensor) -> torch.Tensor:
    return lrq_kernels.unswizzle_scales(scales, *scales.shape)


def swap_layers(file: File) -> None:
    for suffix in ("weight", "weight_scale"):
        one, two = f"square.{suffix}", f"twin.{suffix}"
        file.tensors[one], file.tensors[two] = file.tensors[two], file.tensors[one]


ANY_FORMAT = {
    "marker A and B differ": restate(lambda layers: {**layers, "square": {"format": "float8_e5m2"}}),
    "no marker A": drop("square.comfy_quant"),
    "no marker B": restate(lambda layers: {name: marker for name, marker in layers.items() if name != "square"}),
    "marker A is no JSON": replace("comfy_quant", lambda tensor: tensor[:-1]),
    "marker A is a list": replace("comfy_quant", lambda _: torch.tensor(list(b"[]"), dtype=torch.uint8)),
    "unknown format": remark(format="svdquant_w4a4"),
    "no format": remark(format=None),
    "format is a number": remark(format=4),
    "group is a list": remark(convrot_groupsize=[16]),
    "group is zero": remark(convrot=True, convrot_groupsize=0),
    "no scale": drop("square.weight_scale"),
    "no weight": drop("square.weight"),
    "flat weight": replace("weight", lambda tensor: tensor.flatten()),
    "weight of another shape": replace("weight", lambda tensor: tensor[:-1]),
    "weight of another dtype": replace("weight", lambda tensor: tensor.view(torch.uint8).short()),
    "scale of another shape": replace("weight_scale", lambda tensor: tensor.reshape(1, 1, -1)),
    "scale of another dtype": replace("weight_scale", lambda tensor: tensor.float().double()),
    "a tensor too many": lambda file: file.tensors.update({"square.weight_scale_9": torch.ones(1)}),
}
NEED_SOURCE = ("a tensor too many", "weight of another shape")


@pytest.mark.parametrize("wrong", ANY_FORMAT)
@pytest.mark.parametrize("name", ["fp8", "int8-row", "int8-block", "nvfp4", "mxfp8"])
def test_a_broken_layer_of_any_format_is_named(good, source, name, wrong):
    bad = tampered(good(name), ANY_FORMAT[wrong])
    for given in (source,) if wrong in NEED_SOURCE else (source, None):
        found = failures(bad, given)
        assert any("square" in line for line in found), found
        assert not [line for line in found if "twin" in line or "tile" in line or "norm" in line]


NAN = float("nan")
ONE_FORMAT: dict[tuple[str, str], tuple[Callable[[File], None], str]] = {
    ("int8-row", "scale [N] where N = K"): (replace("weight_scale", torch.Tensor.flatten), "got F32 [64]"),
    ("int8-row", "scale [1,N]"): (replace("weight_scale", lambda s: s.mT), "weight_scale"),
    ("int8-row", "NaN scale"): (replace("weight_scale", lambda s: s.index_fill(0, torch.tensor(3), NAN)), "non-finite"),
    ("int8-row", "negative scale"): (replace("weight_scale", torch.neg), "negative"),
    ("int8-row", "transposed weight"): (replace("weight", lambda w: w.mT), "not made from this weight"),
    ("int8-row", "another layer"): (swap_layers, "not made from this weight"),
    ("int8-row", "a second scale"): (
        lambda file: file.tensors.update({"square.weight_scale_2": torch.ones(())}),
        "weight_scale_2 is no part of int8-row",
    ),
    ("int8-row-convrot16", "no convrot key"): (remark(convrot=None), "not made from this weight"),
    ("int8-row-convrot16", "no group: 256"): (remark(convrot_groupsize=None), "ConvRot group 256"),
    ("int8-row-convrot16", "another group"): (remark(convrot_groupsize=64), "not made from this weight"),
    ("int8-row-convrot16", "no power of 4"): (remark(convrot_groupsize=32), "power of 4"),
    ("int8-row-convrot16", "convrot is a word"): (remark(convrot="yes"), "convrot"),
    ("int8-tensor", "scale [1]"): (replace("weight_scale", lambda s: s.reshape(1)), "got F32 [1]"),
    ("int8-tensor", "infinite scale"): (replace("weight_scale", lambda s: s / 0), "non-finite"),
    ("int8-block", "another group_size"): (remark(group_size=16), "group_size 16"),
    ("int8-block", "scales of another block"): (replace("weight_scale", lambda s: s[::2, ::2]), "group_size 8"),
    ("fp8-block", "oblong blocks"): (replace("weight_scale", lambda s: s[:, ::2]), "into square blocks"),
    ("fp8-block", "transposed scales"): (replace("weight_scale", lambda s: s.mT), "not made from this weight"),
    ("fp8-row", "scale [N,1]"): (replace("weight_scale", lambda s: s[:, None]), "got F32 [64, 1]"),
    ("fp8-row", "as if by tensor"): (remark(format="float8_e4m3fn"), "weight_scale of fp8"),
    ("fp8", "a divisor"): (replace("weight_scale", torch.reciprocal), "not made from this weight"),
    ("fp8", "NaN code"): (replace("weight", poke((0, 0), 0x7F)), "the stored weight is not finite"),
    ("fp8", "E5M2 codes"): (replace("weight", lambda w: w.view(torch.float8_e5m2)), "got F8_E5M2"),
    ("mxfp8", "byte 255"): (replace("weight_scale", poke((0, 0), 255)), "byte 255"),
    ("mxfp8", "E8M0 stored as such"): (
        replace("weight_scale", lambda s: s.view(torch.float8_e8m0fnu)),
        "must be U8 [128, 4], got F8_E8M0",
    ),
    ("mxfp8", "unswizzled"): (replace("weight_scale", unswizzled, "tile"), "not made from this weight"),
    ("mxfp8", "padding of the codes"): (replace("weight", poke((40, 0), 1), "ragged"), "padding of its codes"),
    ("mxfp8", "padding of the scales"): (
        replace("weight_scale", poke((127, 3), 1), "ragged"),
        "padding of its swizzled",
    ),
    ("nvfp4", "swapped nibbles"): (replace("weight", lambda w: (w >> 4) | (w << 4)), "not made from this weight"),
    ("nvfp4", "unswizzled"): (replace("weight_scale", unswizzled, "tile"), "not made from this weight"),
    ("nvfp4", "unswizzled, padded"): (replace("weight_scale", unswizzled), "padding of its swizzled"),
    ("nvfp4", "padding of the codes"): (replace("weight", poke((33, 0), 1), "ragged"), "padding of its codes"),
    ("nvfp4", "padding within a byte row"): (replace("weight", poke((0, 25), 16), "ragged"), "padding of its codes"),
    ("nvfp4", "padding of the scales"): (
        replace("weight_scale", poke((127, 3), 1), "ragged"),
        "padding of its swizzled",
    ),
    ("nvfp4", "NaN block scale"): (replace("weight_scale", poke((0, 0), 0x7F)), "non-finite"),
    ("nvfp4", "negative block scale"): (replace("weight_scale", poke((0, 0), 0x90)), "negative"),
    ("nvfp4", "a divisor"): (replace("weight_scale_2", torch.reciprocal), "not made from this weight"),
    ("nvfp4", "no tensor scale"): (drop("square.weight_scale_2"), "weight_scale_2 is missing"),
}


@pytest.mark.parametrize(("name", "wrong"), ONE_FORMAT)
def test_a_broken_layer_of_one_format_is_named_with_the_rule(good, source, name, wrong):
    change, words = ONE_FORMAT[name, wrong]
    found = failures(tampered(good(name), change), source)
    assert any(words in line for line in found), found
    assert all(line.startswith(("layer square", "layer twin", "layer tile", "layer ragged")) for line in found)


def zero_row(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[5] = 0
    return changed


SUBTLE: dict[tuple[str, str], tuple[Callable[[File], None], str]] = {
    ("nvfp4", "a row of zeros"): (replace("weight", zero_row, "tile"), "times the error expected of them"),
    ("nvfp4", "a larger tensor scale"): (replace("weight_scale_2", lambda s: s * 1.02), "weight_scale_2 is not what"),
    ("fp8", "a scale 2 % larger"): (replace("weight_scale", lambda s: s * 1.02), "weight_scale is not what"),
    ("int8-row", "a scale one place larger"): (
        replace("weight_scale", lambda s: s.nextafter(torch.tensor(9.0))),
        "weight_scale is not what",
    ),
    ("nvfp4", "a block scale of the next code"): (
        replace("weight_scale", lambda s: poke((0, 0), int(s.view(torch.uint8)[0, 0]) + 1)(s)),
        "weight_scale is not what",
    ),
    ("fp8", "full precision asked for"): (remark(full_precision_matrix_mult=True), "lrq writes"),
    ("nvfp4", "a rotation that is none"): (remark(convrot=True), "lrq writes"),
    ("mxfp8", "a foreign key"): (remark(linear_dtype="int8"), "lrq writes"),
}
"""Small enough for the layer's error to stay what it was, nearly."""


@pytest.mark.parametrize(("name", "wrong"), SUBTLE)
def test_small_damage_is_named_too(good, source, name, wrong):
    change, words = SUBTLE[name, wrong]
    found = failures(tampered(good(name), change), source)
    assert any(line.startswith(("layer square", "layer tile")) and words in line for line in found), found


def test_codes_that_are_rounded_to_nearest_must_be_those(source, tmp_path):
    convert(source, tmp_path / "simple.safetensors", "--nvfp4", "--simple")
    change = replace("weight", lambda w: poke((3, 3), int(w[3, 3]) ^ 1)(w))
    found = failures(tampered(tmp_path / "simple.safetensors", change), source)
    assert found == ["layer square: weight is not what the recorded settings give for the source's weight"]


def test_a_layer_put_back_is_noticed(good, source):
    def put_back(file: File) -> None:
        file.tensors = {key: tensor for key, tensor in file.tensors.items() if not key.startswith("twin.")}
        file.tensors["twin.weight"] = RAGGED["twin.weight"]
        restate(lambda layers: {name: marker for name, marker in layers.items() if name != "twin"})(file)

    found = failures(tampered(good("nvfp4"), put_back), source)
    assert found == ["layer twin: is not quantized, though the recorded settings quantize it"]


def test_another_version_of_the_entry_is_noticed(good):
    def renumber(file: File) -> None:
        entry = json.loads(file.metadata["_quantization_metadata"]) | {"format_version": "9"}
        file.metadata["_quantization_metadata"] = json.dumps(entry)

    assert any("format_version must be 1.0" in line for line in failures(tampered(good("fp8"), renumber)))


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
    other = failures(good("nvfp4"), save(tmp_path / "other.safetensors", {**RAGGED, "more": torch.ones(1)}))
    assert {"tensor more: is missing"} < set(other) and "made from another source" in " ".join(other)


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


@pytest.mark.parametrize(("shape", "seed", "flags"), [((1, 2), 252, ()), ((64, 64), 0, ("--coherence", "1000"))])
def test_a_scale_search_that_gave_up_plain_error_is_no_failure(tmp_path, shape, seed, flags):
    """What the coherence asks for may cost more than the limit: in a block or two, or because it is large."""
    source = save(tmp_path / "in.safetensors", {"a.weight": normal(*shape, seed=seed)})
    convert(source, tmp_path / "out.safetensors", "--mxfp8", *flags)
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
