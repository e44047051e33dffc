"""--target_bits: the least summed error within a budget."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import pytest
import torch

import lrq
from checkpoints import convert, load, normal, run, save, transformer
from lrq.checkpoint.reader import Reader
from lrq.config import Conversion
from lrq.errors import InputError
from lrq.formats import FORMATS
from lrq.plan import make_plan
from lrq.run import default_output
from lrq.selection.budget import Point, allocate, least_bits, lower_hull, stored_bits
from measured import save_for


def random_layers(seed: int, count: int) -> dict[str, list[Point]]:
    chance = random.Random(seed)
    layers = {}
    for i in range(count):
        size, base = chance.choice([16, 32, 64]), chance.uniform(1, 100)
        errors = [base, base * chance.uniform(0.05, 1.1), base * chance.uniform(0.02, 1.1), 0.0]
        points = zip(("nvfp4", "fp8", "mxfp8", "source"), (18, 32, 33, 64), errors, strict=True)
        layers[f"l{i}"] = [Point(name, bits * size, error) for name, bits, error in points]
    return layers


@pytest.mark.parametrize("seed", range(10))
def test_every_corner_of_the_hull_is_the_best_of_all_choices(seed):
    layers = random_layers(seed, 6)
    everything = [
        (sum(p.bits for p in choice), sum(p.error for p in choice)) for choice in itertools.product(*layers.values())
    ]
    for bits, error in allocate(layers, least_bits(layers)).corners:
        bought = allocate(layers, bits).chosen.values()
        assert sum(p.bits for p in bought) <= bits
        best = min(e for b, e in everything if b <= bits)
        assert sum(p.error for p in bought) == pytest.approx(best, abs=1e-9) == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_between_the_corners_it_fits_and_no_uniform_format_is_better(seed):
    layers = random_layers(seed, 12)
    low, high = least_bits(layers), sum(points[-1].bits for points in layers.values())
    for budget in range(low, high, 97):
        bought = allocate(layers, budget).chosen.values()
        error = sum(p.error for p in bought)
        assert sum(p.bits for p in bought) <= budget
        for column in zip(*layers.values(), strict=True):
            assert sum(p.bits for p in column) > budget or error <= sum(p.error for p in column) + 1e-9


def test_a_hull_is_convex_and_leaves_out_what_gains_nothing():
    points = [Point("a", 4, 10), Point("b", 8, 9), Point("c", 9, 2), Point("d", 10, 2), Point("e", 16, 0)]
    assert [point.name for point in lower_hull(points)] == ["a", "c", "e"]


def test_bits_are_those_of_the_formats_without_the_scale_of_the_whole():
    bits = {name: stored_bits(FORMATS[name], (256, 512)) / (256 * 512) for name in ("nvfp4", "fp8", "mxfp8")}
    assert bits == {"nvfp4": 4.5, "fp8": 8.0, "mxfp8": 8.25}
    assert stored_bits(FORMATS["fp8"], (4, 256, 512)) == 8 * 4 * 256 * 512


@pytest.fixture
def source(tmp_path):
    tensors = {f"blocks.{i}.fc{j}.weight": normal(256, 128 * j, seed=9 * i + j) for i in range(4) for j in (1, 2)}
    return save(tmp_path / "in.safetensors", tensors)


@pytest.mark.parametrize("target, formats", [(4.5, {"nvfp4"}), (6.0, {"nvfp4", "fp8"}), (8.0, {"fp8"})])
def test_the_plan_and_the_file_spend_the_budget(tmp_path, source, target, formats):
    said = json.loads(run("plan", source, "--target_bits", target, "--json").stdout)
    assert said["formats"].keys() == formats and sum(said["formats"].values()) == 8
    assert target - 0.5 < said["budget"]["bits"] <= target == said["budget"]["target"]
    bits, errors = zip(*said["budget"]["curve"], strict=True)
    assert list(bits) == sorted(bits) and list(errors) == sorted(errors, reverse=True)
    # A larger target would quantize nothing.
    assert 8 < bits[-1] < 16 and run("plan", source, "--target_bits", bits[-1]).exit_code == 0
    (tmp_path / "plan.json").write_text(json.dumps(said))
    lrq.quantize(source, tmp_path / "a", target_bits=target)
    assert run("convert", "-i", source, "-o", tmp_path / "b", "--plan", tmp_path / "plan.json").exit_code == 0
    assert said["output_bytes"] == (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size
    lrq.quantize(source, tmp_path / "c", **json.loads(load(tmp_path / "a").metadata["lrq"])["settings"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert lrq.verify(tmp_path / "a", source).ok


@pytest.mark.parametrize(
    "dtype, kept", [(torch.float32, "bfloat16"), (torch.float64, "bfloat16"), (torch.float16, "skip")]
)
def test_what_is_left_keeps_layers_in_16_bits(tmp_path, dtype, kept):
    source = save(tmp_path / "in", {f"blocks.{i}.fc.weight": normal(128, 128, seed=i).to(dtype) for i in range(4)})
    said = json.loads(run("plan", source, "--target_bits", 10, "--json").stdout)
    found = Counter("skip" if "skip" in spec else spec["format"] for spec in said["layers"].values())
    assert found == {"float8_e4m3fn": 3, kept: 1} and said["budget"]["bits"] == 10
    lrq.quantize(source, tmp_path / "out", target_bits=10)
    assert said["output_bytes"] == (tmp_path / "out").stat().st_size and lrq.verify(tmp_path / "out", source).ok


def test_what_rules_ask_for_stays_and_counts(tmp_path, source):
    flags = ("--custom-layers", "fc1", "--custom-type", "int8", "--simple")
    result = run("convert", "-i", source, "-o", tmp_path / "out", "--target_bits", 6, *flags)
    assert result.exit_code == 0 and "target 6 bits: " in result.stderr
    formats = {name: marker["format"] for name, marker in load(tmp_path / "out").stated.items()}
    assert {formats[name] for name in formats if "fc1" in name} == {"int8_tensorwise"}
    # A third of the weights has 8 bits, the rest may have 5 on average.
    assert Counter(formats.values()) == {"int8_tensorwise": 4, "nvfp4": 4}


def test_what_a_preset_stores_wider_than_nvfp4_stays_so(tmp_path):
    shapes = {"img_in": (64, 64), "double_blocks.0.img_mod.lin": (384, 64), "double_blocks.0.img_attn.qkv": (192, 64)}
    source = save(tmp_path / "in", {f"{name}.weight": normal(*shape) for name, shape in shapes.items()})
    lrq.quantize(source, tmp_path / "out", preset="flux1", target_bits=8)
    formats = {name: marker["format"] for name, marker in load(tmp_path / "out").stated.items()}
    assert formats["double_blocks.0.img_mod.lin"] == "float8_e4m3fn" and "img_in" not in formats


def test_weights_that_nvfp4_does_not_take_have_the_other_formats(tmp_path):
    source = save(tmp_path / "in", {f"blocks.{i}.fc.weight": normal(64, 24, seed=i) for i in range(3)})
    assert "the smallest formats that the layers take need " in run("plan", source, "--target_bits", 4.2).stderr
    summary = lrq.quantize(source, tmp_path / "out", target_bits=12)
    assert lrq.verify(tmp_path / "out", source).ok and summary.formats.keys() == {"fp8", "bfloat16"}


def test_the_output_is_named_after_the_target(tmp_path):
    source = save(tmp_path / "in.safetensors", transformer())
    conversion = Conversion.from_settings({"target_bits": 6.5})
    with Reader(source) as reader:
        assert default_output(source, make_plan(reader, conversion), conversion).name == "in-6.5bits.safetensors"


@pytest.mark.parametrize(
    "settings", [{"int8": True}, {"mxfp8": True}, {"scaling_mode": "row"}, {"max_error": 0.1}, {"target_bits": 0}]
)
def test_the_target_alone_chooses_formats(tmp_path, source, settings):
    with pytest.raises(InputError, match="--target_bits: "):
        lrq.quantize(source, tmp_path / "out", **{"target_bits": 6, **settings})


def test_a_plan_reads_no_weights_unless_told_to(tmp_path, source):
    said = [
        run("plan", source, "--nvfp4", "--max_error", 0.05, *more, "--json").stdout for more in ((), ("--measure",))
    ]
    assert [set(json.loads(one)["formats"]) for one in said] == [{"nvfp4"}, {"mxfp8"}]
    convert(source, tmp_path / "out", "--nvfp4", "--max_error", 0.05)
    assert json.loads(said[1])["output_bytes"] == (tmp_path / "out").stat().st_size


def test_with_statistics_the_error_of_the_outputs_counts(tmp_path):
    # The first has the larger errors, where its inputs are zero.
    first, second = normal(256, 256, seed=1), 1 + 0.02 * normal(256, 256, seed=2)
    first[:, :128] = 0
    source = save(tmp_path / "in", {"blocks.0.fc.weight": first, "blocks.1.fc.weight": second})
    x = normal(600, 256, seed=3)
    dead = x.clone()
    dead[:, 128:] = 0
    calib = save_for(tmp_path / "stats", {"blocks.0.fc": dead, "blocks.1.fc": x})
    for flags, wide in (((), "blocks.0.fc"), (("--calib", calib), "blocks.1.fc")):
        said = json.loads(run("plan", source, "--target_bits", 6.25, *flags, "--json", "--preset", "none").stdout)
        assert said["layers"][wide]["format"] == "float8_e4m3fn", said["layers"]


@pytest.mark.parametrize(
    "config",
    [
        {"fc1|fc2": {"format": "fp8"}},
        {"_default": {"format": "fp8"}},
        {"fc1": {"format": "fp8"}, "fc2": {"format": "int8"}},
    ],
)
def test_a_target_beside_rules_for_all_layers_is_an_error(tmp_path, source, config):
    with pytest.raises(InputError, match="--target_bits 6: rules decide on 8 layers, which are all; leave the target"):
        lrq.quantize(source, tmp_path / "out", target_bits=6, layer_config=config)
    (tmp_path / "rules").write_text(json.dumps(config))
    result = run("plan", source, "--target_bits", 6, "--layer_config", tmp_path / "rules")
    assert result.exit_code == 2 and "rules decide on 8 layers" in result.stderr


def test_a_default_that_names_no_format_leaves_the_choice(tmp_path, source):
    config = {"_default": {"simple": True, "full_precision_matrix_mult": True}}
    (tmp_path / "rules").write_text(json.dumps(config))
    said = json.loads(run("plan", source, "--target_bits", 6, "--layer_config", tmp_path / "rules", "--json").stdout)
    assert said["formats"].keys() == {"nvfp4", "fp8"}
    assert all(spec["simple"] and spec["full_precision_matrix_mult"] for spec in said["layers"].values())


@pytest.mark.parametrize("target", [16, 20, 32])
def test_a_target_that_leaves_all_as_it_is_ends_plan_and_conversion_alike(tmp_path, target):
    source = save(tmp_path / "in", {f"{name}.weight": normal(64, 64).bfloat16() for name in "abcdef"})
    words = f"no layer can be quantized (6 layers: --target_bits {target}); choose a smaller --target_bits"
    for command in (("plan", source), ("convert", "-i", source, "--dry-run"), ("convert", "-i", source)):
        result = run(*command, "--target_bits", target)
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and line.startswith("error: ") and words in line


@pytest.mark.parametrize(
    "value, words", [(torch.nan, "NaN or Inf"), (torch.inf, "NaN or Inf"), (3e38, "the value 3e+38")]
)
def test_what_can_not_be_measured_is_named(tmp_path, value, words):
    layers = {f"blocks.{i}.fc.weight": normal(64, 64, seed=i) for i in range(3)}
    layers["blocks.1.fc.weight"][3, 4] = value
    source = save(tmp_path / "in", layers)
    for flags in (("--target_bits", 12), ("--nvfp4", "--max_error", 0.05, "--measure")):
        result = run("plan", source, *flags)
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and f"blocks.1.fc.weight holds {words}" in line


def test_large_weights_have_the_errors_of_small_ones(tmp_path):
    said = []
    for i, scale in enumerate((1e-10, 1.0, 2.0**90)):
        layers = {f"blocks.{j}.fc.weight": normal(64, 64 << j, seed=j) * scale for j in range(2)}
        source = save(tmp_path / f"{i}", layers)
        said.append(json.loads(run("plan", source, "--target_bits", 6, "--json").stdout)["budget"])
    assert said[1] == said[2] and said[0]["error"] == pytest.approx(said[1]["error"], rel=0.02)


def test_a_setting_is_the_same_as_an_integer_and_a_huge_one_is_an_error(tmp_path, source):
    for target in (10, 10.0):
        lrq.quantize(source, tmp_path / f"{target}", target_bits=target, simple=True)
    assert (tmp_path / "10").read_bytes() == (tmp_path / "10.0").read_bytes()
    with pytest.raises(InputError, match=r"--target_bits: must be from 1\.0 to 64\.0"):
        lrq.quantize(source, tmp_path / "out", target_bits=10**400)
