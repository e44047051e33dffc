"""The plan knows every byte's place before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lrq
from checkpoints import FLAGS, LAYERS, convert, load, normal, save, transformer
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion, Rounding, Selection, Storage
from lrq.errors import InputError
from lrq.formats import FORMATS
from lrq.plan import Plan, make_plan, recorded
from lrq.selection.storage import choose_format

STORAGE = {
    "fp8": Storage(),
    "fp8-row": Storage(scaling_mode="row"),
    "fp8-block": Storage(scaling_mode="block", block_size=8),
    "int8-tensor": Storage(int8=True),
    "int8-row": Storage(int8=True, scaling_mode="row"),
    "int8-block": Storage(int8=True, block_size=8),
    "int8-row-convrot16": Storage(int8=True, scaling_mode="row", convrot=True, convrot_group_size=16),
    "nvfp4": Storage(nvfp4=True),
    "mxfp8": Storage(mxfp8=True),
}


def plan(path: Path, storage: Storage | None = None, **settings: object) -> Plan:
    with Reader(path) as reader:
        return make_plan(reader, Conversion(storage=storage or Storage(), **settings))


def test_the_table_above_has_every_format():
    assert STORAGE.keys() == FLAGS.keys() and len(STORAGE) == len(FORMATS)


@pytest.mark.parametrize("name", STORAGE)
def test_no_weight_is_read(tmp_path, monkeypatch, name):
    source = save(tmp_path / "in", transformer(), {"format": "pt"})
    monkeypatch.setattr(Reader, "read", None)
    monkeypatch.setattr(Reader, "chunks", None)
    made = plan(source, STORAGE[name])
    assert [layer.name for layer in made.layers] == list(LAYERS)
    assert {layer.format.name for layer in made.layers} == {name}


@pytest.mark.parametrize("name", STORAGE)
def test_the_output_begins_with_the_planned_header_and_has_the_planned_size(tmp_path, name):
    source = save(tmp_path / "in", transformer())
    made = plan(source, STORAGE[name], rounding=Rounding(simple=True))
    convert(source, tmp_path / "out", *FLAGS[name])
    written = (tmp_path / "out").read_bytes()
    assert len(written) == made.output_size and written.startswith(made.header_bytes)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["nvfp4", "mxfp8", "fp8", "fp8-row", "int8-row"]))
def test_shapes_are_those_of_the_contract(tmp_path, rows, columns, name):
    """docs/FORMATS.md sections 1 and 2."""
    source = save(tmp_path / "in", {"a.weight": torch.zeros(rows, columns)})
    stored = {e.name.removeprefix("a."): (e.dtype, e.shape) for e in plan(source, STORAGE[name]).header.entries}
    stored.pop("comfy_quant")

    def up(value: int, multiple: int) -> int:
        return -(-value // multiple) * multiple

    def scales(n: int, blocks: int) -> tuple[int, int]:
        return up(n, 128), up(blocks, 4)

    n16, k16, n32, k32 = up(rows, 16), up(columns, 16), up(rows, 32), up(columns, 32)
    expected = {
        "fp8": {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("F32", ())},
        "fp8-row": {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("F32", (rows,))},
        "int8-row": {"weight": ("I8", (rows, columns)), "weight_scale": ("F32", (rows, 1))},
        "mxfp8": {"weight": ("F8_E4M3", (n32, k32)), "weight_scale": ("U8", scales(n32, k32 // 32))},
        "nvfp4": {
            "weight": ("U8", (n16, k16 // 2)),
            "weight_scale": ("F8_E4M3", scales(n16, k16 // 16)),
            "weight_scale_2": ("F32", ()),
        },
    }
    assert stored == expected[name]


def test_the_markers_are_those_of_the_contract(tmp_path):
    source = save(tmp_path / "in", {"a.weight": torch.zeros(16, 16)})
    for name, expected in {
        "fp8": {"format": "float8_e4m3fn"},
        "fp8-row": {"format": "float8_e4m3fn_rowwise"},
        "fp8-block": {"format": "float8_e4m3fn_blockwise", "group_size": 8},
        "int8-tensor": {"format": "int8_tensorwise"},
        "int8-row": {"format": "int8_tensorwise"},
        "int8-block": {"format": "int8_blockwise", "group_size": 8},
        "int8-row-convrot16": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16},
        "nvfp4": {"format": "nvfp4"},
        "mxfp8": {"format": "mxfp8"},
    }.items():
        stated = json.loads(plan(source, STORAGE[name]).header.metadata["_quantization_metadata"])
        assert stated == {"format_version": "1.0", "layers": {"a": expected}}


def test_default_blocks_and_groups():
    assert choose_format(Storage(scaling_mode="block"), (64, 128)) == FORMATS["fp8-block"]
    assert choose_format(Storage(int8=True, scaling_mode="block"), (128, 256)) == FORMATS["int8-block"]
    convrot = Storage(int8=True, scaling_mode="row", convrot=True)
    assert choose_format(convrot, (8, 512)) == FORMATS["int8-row-convrot"]
    assert choose_format(convrot, (8, 192)).name == "int8-row-convrot64"
    assert choose_format(convrot, (8, 96)) == "K must be a multiple of the ConvRot group 64, got 96"
    assert choose_format(convrot, (2, 8, 256)) == "ComfyUI drops ConvRot from expert banks"


def test_every_tensor_is_accounted_for(tmp_path, digits):
    made = plan(digits, STORAGE["nvfp4"])
    names = set(load(digits).tensors)
    quantized = {layer.source.name for layer in made.layers}
    assert {entry.name for entry in made.copied} == names - quantized == made.kept.keys() | made.refused.keys()
    assert quantized == {f"blocks.{i}.{part}.weight" for i in range(4) for part in ("qkv", "proj", "fc1", "fc2")}


def test_a_shape_that_does_not_fit_is_refused_with_the_rule(tmp_path):
    source = save(tmp_path / "in", {"a.weight": normal(16, 16), "b.weight": normal(12, 16)})
    made = plan(source, STORAGE["int8-block"])
    assert made.refused == {"b.weight": "N and K must be multiples of the block 8, got 12 x 16"}
    assert [entry.name for entry in made.copied] == ["b.weight"]


def test_exclusion_finds_any_part_of_the_layer_name(tmp_path):
    source = save(tmp_path / "in", transformer())
    made = plan(source, selection=Selection(exclude_layers=r"\.0\..*qkv|fc$"))
    assert [layer.name for layer in made.layers] == ["blocks.1.attn.qkv"]
    assert {name for name, why in made.kept.items() if "excluded" in why} == {
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc.weight",
        "blocks.1.mlp.fc.weight",
    }


def test_excluding_what_is_kept_anyway_is_no_error(tmp_path):
    source = save(tmp_path / "in", transformer())
    assert len(plan(source, selection=Selection(exclude_layers="token_embedding")).layers) == 4
    with pytest.raises(InputError, match="finds no layer to exclude"):
        plan(source, selection=Selection(exclude_layers="token_embeddings"))


def test_a_prefix_stays_in_names_and_markers(tmp_path):
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in transformer().items()}
    made = plan(save(tmp_path / "in", prefixed))
    layers = json.loads(made.header.metadata["_quantization_metadata"])["layers"]
    assert set(layers) == {f"model.diffusion_model.{name}" for name in LAYERS}


def test_markers_of_a_source_are_kept_for_quantized_layers_only(tmp_path):
    """Marker B alone, of a format that lrq doesn't write, beside a stale one."""
    tensors = {"a.weight": normal(16, 16), "b.weight": torch.zeros(16, 8, dtype=torch.int8)}
    tensors |= {"b.weight_s_rel": torch.zeros(16, 1), "norm.weight": normal(16)}
    foreign = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256}
    stated = {"a": {"format": "stale"}, "b": foreign, "norm": {"format": "stale"}, "gone": {"format": "stale"}}
    metadata = {"_quantization_metadata": json.dumps({"layers": stated})}
    made = plan(save(tmp_path / "in", tensors, metadata))
    layers = json.loads(made.header.metadata["_quantization_metadata"])["layers"]
    assert layers == {"a": {"format": "float8_e4m3fn"}, "b": foreign}


@pytest.mark.parametrize("broken", ["", "nope", "[]", "[" * 99_999, '{"layers": []}', '{"layers": {"a": 1}}'])
def test_a_broken_entry_of_a_source_is_dropped(tmp_path, broken):
    source = save(tmp_path / "in", transformer(), {"_quantization_metadata": broken, "format": "pt"})
    layers = json.loads(plan(source).header.metadata["_quantization_metadata"])["layers"]
    assert set(layers) == set(LAYERS)


@pytest.mark.parametrize("sibling", ["weight_scale", "scale_weight", "weight_s_rel", "comfy_quant"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bfloat16])
def test_a_quantized_weight_is_never_quantized_again(tmp_path, sibling, dtype):
    tensors = {"a.weight": normal(16, 16).to(dtype), f"a.{sibling}": torch.ones(1), "b.weight": normal(16, 16)}
    if sibling == "comfy_quant":
        tensors["a.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    if sibling == "weight_scale":
        with pytest.raises(InputError, match="layer a: quantized already, but without a marker"):
            plan(save(tmp_path / "in", tensors))
        return
    made = plan(save(tmp_path / "in", tensors))
    assert [layer.name for layer in made.layers] == ["b"]
    assert made.kept["a.weight"] == "quantized already"


def test_an_fp8_weight_without_a_scale_stays_too(tmp_path):
    made = plan(save(tmp_path / "in", {"a.weight": normal(8, 8).to(torch.float8_e4m3fn), "b.weight": normal(8, 8)}))
    assert made.kept == {"a.weight": "F8_E4M3"}


def test_settings_survive_the_way_through_the_provenance(tmp_path):
    source = save(tmp_path / "in", transformer())
    conversion = Conversion(storage=STORAGE["int8-row-convrot16"], selection=Selection(exclude_layers="fc"), seed=7)
    with Reader(source) as reader:
        made = make_plan(reader, conversion)
    assert recorded(made.header.metadata["lrq"]) == conversion
    hostile = (
        None,
        "",
        "nope",
        "[]",
        "[" * 99_999,
        '{"settings": []}',
        '{"settings": {"seed": "x"}}',
        '{"settings": {"later": 1}}',
    )
    for broken in hostile:
        assert recorded(broken) is None


def test_what_would_act_on_a_quantized_layer_is_left_out(tmp_path):
    tensors = {"a.weight": normal(16, 16), "a.input_scale": torch.tensor(0.1), "a.pre_quant_scale": torch.ones(16)}
    kept = {"norm.weight": torch.ones(16), "norm.input_scale": torch.tensor(0.2)}
    source = save(tmp_path / "in.safetensors", tensors | kept)
    made = plan(source)
    assert [entry.name for entry in made.dropped] == ["a.input_scale", "a.pre_quant_scale"]
    names = {entry.name for entry in made.header.entries}
    assert kept.keys() < names and not {"a.input_scale", "a.pre_quant_scale"} & names
    summary = lrq.quantize(source, tmp_path / "out.safetensors", simple=True)
    assert [notice.partition(":")[0] for notice in summary.notices if "left out" in notice] == [
        "a.input_scale is left out",
        "a.pre_quant_scale is left out",
    ]
    assert lrq.verify(tmp_path / "out.safetensors", source).ok


@pytest.mark.parametrize("marker", [b"{}", b"nonsense", b'{"format": 4}', b"[]"])
def test_a_source_whose_marker_says_nothing_is_refused(tmp_path, marker):
    tensors = {"a.weight": normal(8, 8), "a.comfy_quant": torch.tensor(list(marker), dtype=torch.uint8)}
    with pytest.raises(InputError, match="layer a: quantized already, but its comfy_quant "):
        plan(save(tmp_path / "in", tensors | {"b.weight": normal(8, 8)}))


def test_a_header_that_no_loader_takes_is_refused(tmp_path, monkeypatch):
    source = save(tmp_path / "in", transformer())
    monkeypatch.setattr("lrq.checkpoint.header.MAX_HEADER", 2000)
    with pytest.raises(InputError, match="over the limit of 2000 that loaders have"):
        plan(source)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"simple": True, "seed": 5}, ["--seed has no effect: --simple"]),
        ({"nvfp4": True, "scale_search": False, "coherence": 2.0}, ["--coherence has no effect: --scale_search off"]),
        ({"int8": True, "coherence": 2.0}, ["--coherence has no effect: INT8 has no block scales to search"]),
        ({"nvfp4": True, "coherence": 2.0, "seed": 5, "num_iter": 3}, []),
        ({"simple": True, "seed": 0}, []),
    ],
)
def test_settings_without_effect_are_said(settings, words):
    assert Conversion.from_settings(settings).without_effect() == words
