"""A file with one thing wrong in its layers fails, and the failure names it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from damage import RAGGED, drop, failures, poke, remark, replace, restate, swap_layers, unswizzled

from checkpoints import File, convert, tampered

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
