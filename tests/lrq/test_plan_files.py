"""lrq convert --plan: what is edited in a plan is done, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import lrq
from checkpoints import LAYERS, load, normal, run, save, transformer


@pytest.fixture
def source(tmp_path) -> Path:
    tensors = transformer() | {"blocks.0.wide.weight": normal(128, 256)}
    return save(tmp_path / "in.safetensors", tensors)


def planned(*args: object) -> dict:
    result = run("plan", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_edited_plan_is_followed_recorded_and_verified(tmp_path, source):
    table = planned(source, "--nvfp4", "--simple")
    table["layers"][LAYERS[0]] = {"format": "mxfp8"}
    table["layers"][LAYERS[1]] = {"skip": True}
    table["layers"]["token_embedding"] = {"format": "fp8"}
    (tmp_path / "plan.json").write_text(json.dumps(table))
    result = run("convert", "-i", source, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    formats = {layer: marker["format"] for layer, marker in load(tmp_path / "out").stated.items()}
    assert formats == {
        LAYERS[0]: "mxfp8",
        LAYERS[2]: "nvfp4",
        LAYERS[3]: "nvfp4",
        "blocks.0.wide": "nvfp4",
        "token_embedding": "float8_e4m3fn",
    }
    assert lrq.verify(tmp_path / "out", source).ok


def layer(name: str, spec: object) -> Callable[[dict], None]:
    return lambda plan: plan["layers"].update({name: spec})


BLOCKS_OF_100 = {"format": "fp8-block", "block_size": 100}
GROUPS_OF_1024 = {"format": "int8-row-convrot", "convrot_group_size": 1024}
BROKEN = {
    "no plan": ("{}", "not a plan"),
    "no JSON": ("{\n\nx", "line 3: not JSON"),
    "a list": ("[]", "not a plan"),
    "no layer": (layer("nowhere", {"skip": True}), "layer nowhere: is not in the checkpoint"),
    "bad format": (layer(LAYERS[0], {"format": "fp9"}), "no such format 'fp9'"),
    "bad settings": (lambda plan: plan["settings"].update({"seed": "x"}), "settings: --seed: must be int"),
    "later": (lambda plan: plan.update({"lrq_plan": 2}), "not a plan of this version"),
    "true": (lambda plan: plan.update({"lrq_plan": True}), "not a plan of this version"),
    "other version": (lambda plan: plan.update({"version": "9.9"}), "is of lrq 9.9, and this is 0"),
    "other": (lambda plan: plan["source"].update({"header_sha256": "0"}), "is of another checkpoint"),
    "a norm": (
        layer("blocks.0.norm1", {"format": "fp8"}),
        "layer blocks.0.norm1 (edited in the plan): can't be quantized so: not a matrix of weights; choose another",
    ),
    "a table": (layer("token_embedding", {"format": "nvfp4"}), "embedding, which can only be fp8 or int8-tensor or"),
    "blocks": (layer(LAYERS[0], BLOCKS_OF_100), "so: N and K must be multiples of the block 100, got 48 x 32; choose"),
    "groups": (layer("blocks.0.wide", GROUPS_OF_1024), "so: K must be a multiple of the ConvRot group 1024, got 256"),
    "deleted": (
        lambda plan: plan["layers"].pop(LAYERS[1]),
        f'layers: {LAYERS[1]} missing; for a layer to stay as it is write "{LAYERS[1]}": {{"skip": true}}',
    ),
}


def refused(source: Path, text: str) -> str:
    plan, output = source.with_name("plan.json"), source.with_name("out")
    plan.write_text(text)
    result = run("convert", "-i", source, "-o", output, "--plan", plan)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: ") and not output.exists()
    return line


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plan_is_one_line(source, name):
    change, words = BROKEN[name]
    text = change
    if callable(change):
        plan = planned(source, "--nvfp4")
        change(plan)
        text = json.dumps(plan)
    assert words in refused(source, str(text))


def test_a_layer_that_is_there_twice_is_an_error(source):
    text = json.dumps(planned(source, "--nvfp4"))
    line = refused(source, text.replace('"layers": {"', f'"layers": {{"{LAYERS[2]}": {{"skip": true}}, "'))
    assert f"duplicate key '{LAYERS[2]}'; leave one of the two" in line


def test_what_a_preset_leaves_out_is_not_brought_back(tmp_path):
    tensors = {f"encoder.block.{i}.layer.0.SelfAttention.q.weight": normal(64, 64, seed=i) for i in range(2)}
    tensors |= {"shared.weight": normal(99, 64), "decoder.block.0.layer.0.SelfAttention.q.weight": normal(64, 64)}
    source = save(tmp_path / "in.safetensors", tensors)
    plan = planned(source, "--nvfp4", "--t5xxl")
    plan["layers"]["decoder.block.0.layer.0.SelfAttention.q"] = {"format": "fp8"}
    assert "decoder.block.0.layer.0.SelfAttention.q (edited in the plan): is left out: " in refused(
        source, json.dumps(plan)
    )


def test_a_byte_order_mark_is_no_fault(tmp_path, source):
    plan, rules, scales = (tmp_path / f"{name}.json" for name in ("plan", "rules", "scales"))
    rules.write_text('{"fc": {"format": "fp8"}}', encoding="utf-8-sig")
    scales.write_text(json.dumps({LAYERS[0]: 0.5}), encoding="utf-8-sig")
    flags = ("--nvfp4", "--simple", "--layer_config", rules, "--input_scales", scales)
    plan.write_text(json.dumps(planned(source, *flags)), encoding="utf-8-sig")
    assert run("convert", "-i", source, "-o", tmp_path / "out", "--plan", plan).exit_code == 0
    file = load(tmp_path / "out")
    assert file.stated[LAYERS[1]]["format"] == "float8_e4m3fn" and f"{LAYERS[0]}.input_scale" in file.tensors
