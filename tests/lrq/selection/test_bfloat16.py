"""Weights that are not quantized, but stored in 16 bits where they take 32 or 64."""

from __future__ import annotations

import json

import pytest
import torch

import lrq
from checkpoints import convert, load, normal, run, same_bytes, save, tampered
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
from lrq.formats import bfloat16
from lrq.plan import make_plan
from lrq.staging.memory import PIECE

NAMES = [f"blocks.{i}.fc.weight" for i in range(4)]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture
def source(tmp_path):
    """A layer of every dtype, and one more to quantize."""
    tensors = {
        name: normal(96, 128, seed=i).to(dtype) for i, (name, dtype) in enumerate(zip(NAMES, DTYPES, strict=True))
    }
    return save(
        tmp_path / "in.safetensors", {**tensors, "blocks.4.fc.weight": normal(64, 64), "norm.weight": normal(64)}
    )


RULES = {
    "custom": (("--custom-layers", r"blocks\.[0-3]", "--custom-type", "bfloat16"), "--custom_layers"),
    "fallback": (("--exclude-layers", r"blocks\.[0-3]", "--fallback", "bfloat16"), "--fallback: excluded by"),
    "config": (("--layer-config", "rules.json"), r"--layer_config blocks\.[0-3]"),
}


@pytest.mark.parametrize("kind", RULES)
def test_wider_weights_are_rounded_and_others_stay(tmp_path, source, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.json").write_text(json.dumps({r"blocks\.[0-3]": {"format": "bfloat16"}}))
    flags, why = RULES[kind]
    said = json.loads(run("plan", source, "--json", *flags).stdout)
    result = convert(source, tmp_path / "out", *flags)
    assert "1 layer to fp8, 2 layers to bfloat16" in result.output
    before, after = load(source).tensors, load(tmp_path / "out").tensors
    for name in (*NAMES, "norm.weight"):
        wide = name in NAMES[:2]
        assert same_bytes(after[name], before[name].float().bfloat16() if wide else before[name])
    assert load(tmp_path / "out").stated.keys() == load(tmp_path / "out").marked.keys() == {"blocks.4.fc"}
    assert said["output_bytes"] == (tmp_path / "out").stat().st_size and said["formats"] == {"fp8": 1, "bfloat16": 2}
    assert said["layers"]["blocks.0.fc"]["format"] == "bfloat16" and said["layers"]["blocks.2.fc"] == {
        "skip": True,
        "_why": f"{said['layers']['blocks.0.fc']['_why']}: F16 already",
    }
    assert said["layers"]["blocks.0.fc"]["_why"].startswith(why)
    found = lrq.verify(tmp_path / "out", source)
    assert found.ok and (found.unchanged, found.bfloat16) == (3, 2)
    assert "3 tensors unchanged, 2 rounded to bfloat16" in run("verify", tmp_path / "out", "--source", source).output


def test_a_plan_and_a_template_decide_the_same_again(tmp_path, source):
    flags = ("--custom-layers", "blocks.0", "--custom-type", "bfloat16")
    convert(source, tmp_path / "a", *flags)
    (tmp_path / "plan.json").write_text(run("plan", source, "--json", "--simple", *flags).stdout)
    assert run("convert", "-i", source, "-o", tmp_path / "b", "--plan", tmp_path / "plan.json").exit_code == 0
    run("convert", "-i", source, "--dry-run", "create-template", "-o", tmp_path / "rules.json", *flags)
    convert(source, tmp_path / "c", "--layer-config", tmp_path / "rules.json")
    settings = json.loads(load(tmp_path / "a").metadata["lrq"])["settings"]
    lrq.quantize(source, tmp_path / "d", **settings)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "d").read_bytes()
    assert load(tmp_path / "c").tensors.keys() == load(tmp_path / "a").tensors.keys()
    assert all(same_bytes(t, load(tmp_path / "a").tensors[name]) for name, t in load(tmp_path / "c").tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", [(), ("--low_memory",), ("--shard_size", "6MB")])
def test_pieces_meet_without_a_seam(tmp_path, dtype, flags):
    count = PIECE // dtype.itemsize
    wide = normal(3, count // 2 + 12345).to(dtype)
    source = save(tmp_path / "in.safetensors", {"a.wide.weight": wide, "b.fc.weight": normal(64, 64)})
    convert(source, tmp_path / "out.safetensors", "--custom-layers", "wide", "--custom-type", "bfloat16", *flags)
    with Reader(next(tmp_path.glob("out*safetensors*json"), tmp_path / "out.safetensors")) as made:
        assert same_bytes(made.read("a.wide.weight"), wide.float().bfloat16())
    assert lrq.verify(made.path, source).ok


@pytest.mark.parametrize("dtype, value", [(torch.float32, 3.4e38), (torch.float64, 1e39)])
def test_a_value_beyond_its_largest_is_an_error(tmp_path, dtype, value):
    wide = normal(64, 64).to(dtype)
    wide[3, 5] = value
    source = save(tmp_path / "in", {"a.wide.weight": wide, "b.fc.weight": normal(64, 64)})
    flags = ("--simple", "--custom-layers", "wide", "--custom-type", "bfloat16")
    result = run("convert", "-i", source, "-o", tmp_path / "out", *flags)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "a.wide.weight holds a value beyond bfloat16's largest, 3.39e38; leave it" in line
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_stays_so(tmp_path):
    wide = normal(64, 64)
    wide[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    source = save(tmp_path / "in", {"a.wide.weight": wide, "b.fc.weight": normal(64, 64)})
    convert(source, tmp_path / "out", "--custom-layers", "wide", "--custom-type", "bfloat16")
    assert same_bytes(load(tmp_path / "out").tensors["a.wide.weight"], wide.bfloat16())


CHANGES = {
    "a bit": (
        lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 7, t * 2, t),
        "is not the source's, rounded",
    ),
    "another dtype": (torch.Tensor.float, "should be BF16 [96, 128], is F32 [96, 128]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_verify_notices(tmp_path, source, change):
    convert(source, tmp_path / "out", "--custom-layers", r"blocks\.0", "--custom-type", "bfloat16")
    how, words = CHANGES[change]
    wrong = tampered(tmp_path / "out", lambda file: file.tensors.update({NAMES[0]: how(file.tensors[NAMES[0]])}))
    (failure,) = lrq.verify(wrong, source).failures
    assert failure.startswith(f"tensor {NAMES[0]}: {words}")
    with_plain_settings = tampered(tmp_path / "out", lambda file: file.metadata.pop("lrq"))
    assert f"tensor {NAMES[0]}: was F32" in "".join(lrq.verify(with_plain_settings, source).failures)


ERRORS = {
    "a key that means nothing": (
        {"fc": {"format": "bfloat16", "simple": True}},
        "simple has no meaning beside bfloat16",
    ),
    "a word nearby": ({"fc": {"format": "bfloat61"}}, "did you mean bfloat16?"),
    "nothing to quantize": (
        {"_default": {"format": "bfloat16"}},
        "no layer can be quantized (3 layers: --layer_config _default; 1",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_what_is_wrong_is_named(tmp_path, source, kind):
    rules, words = ERRORS[kind]
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    result = run("plan", source, "--layer-config", tmp_path / "rules.json")
    assert result.exit_code == 2 and words in result.stderr.splitlines()[-1]


def test_it_holds_for_all_that_no_rule_names(tmp_path, source):
    rules = {"_default": {"format": "bfloat16"}, r"blocks\.4": {"format": "nvfp4"}}
    with Reader(source) as reader:
        plan = make_plan(reader, Conversion.from_settings({"layer_config": rules}))
    assert [layer.format.name for layer in plan.layers] == ["nvfp4"] and plan.bfloat16.keys() == set(NAMES[:2])


def test_embeddings_may_have_it_and_norms_only_by_name(tmp_path):
    shapes = {
        "embed_tokens": (128, 64),
        "layers.0.mlp.gate": (64, 64),
        "layers.0.norm": (64, 64),
        "layers.0.up": (64, 64),
    }
    source = save(tmp_path / "in", {f"model.{name}.weight": normal(*shape) for name, shape in shapes.items()})
    found = []
    for settings in ({"fallback": "bfloat16"}, {"custom_layers": "norm", "custom_type": "bfloat16"}):
        with Reader(source) as reader:
            found.append(set(make_plan(reader, Conversion.from_settings(settings)).bfloat16))
    assert found == [{"model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"}, {"model.layers.0.norm.weight"}]


def test_rounding_in_place_is_that_of_a_copy():
    w = normal(70_001, 3, seed=5) * torch.logspace(-40, 38, 3)
    for dtype in bfloat16.WIDER.values():
        data = w.to(dtype).reshape(-1).clone()
        half = bfloat16.round_in_place(data.view(torch.uint8), dtype).view(torch.bfloat16)
        assert same_bytes(half, w.to(dtype).float().bfloat16().reshape(-1))
