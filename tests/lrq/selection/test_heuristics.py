"""--heur: what is skipped, and the reason that it is given."""

from __future__ import annotations

import json
import re

import pytest
import torch

import lrq
from checkpoints import load, normal, run, save
from lrq.formats import FORMATS
from lrq.selection import heuristics
from lrq.selection.heuristics import out_of_line, relative_error, unsuitable


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("nvfp4", (512, 512), None),
        ("nvfp4", (64, 64), "too small to gain: 4096 weights, under 65536"),
        ("nvfp4", (512, 528), "no fast matmul: K padded to 16 must be a multiple of 32, got 528"),
        ("mxfp8", (512, 528), None),
        ("fp8", (3420, 1280), "no fast matmul: N and K must be multiples of 16, got 3420 x 1280"),
        ("int8-row", (4304, 1152), None),
        ("int8-row", (3420, 1280), "no fast matmul: N and K must be multiples of 8, got 3420 x 1280"),
        ("fp8-row", (512, 512), "no fast matmul: fp8-row is read by a custom node"),
        ("fp8", (16384, 64), "extreme aspect ratio: 16384 x 64, over 64 : 1"),
    ],
)
def test_reasons_from_shapes(name, shape, reason):
    assert unsuitable(FORMATS[name], shape) == reason


def test_errors_out_of_line_are_found():
    weights = {f"l{i}": normal(64, 128, seed=i) for i in range(8)}
    weights["l5"][0, 0] = 500.0
    layers = [(name, FORMATS["int8-tensor"]) for name in weights]
    reasons = out_of_line(layers, weights.__getitem__)
    assert reasons.keys() == {"l5"} and reasons["l5"].startswith("error out of line: ")
    assert out_of_line(layers[4:7], weights.__getitem__) == {}
    assert relative_error(FORMATS["nvfp4"], torch.zeros(16, 16)) == 0


def test_skips_are_measured_named_recorded_and_verified(tmp_path):
    tensors = {f"blocks.{i}.fc.weight": normal(256, 256, seed=i) for i in range(8)}
    tensors["blocks.3.fc.weight"][7, 7] = 900.0
    tensors["blocks.0.small.weight"] = normal(16, 16)
    source = save(tmp_path / "in", tensors)
    result = run("convert", "-i", source, "-o", tmp_path / "out", "--int8", "--simple", "--heur", "--verbose")
    assert result.exit_code == 0, result.output
    assert "keep  blocks.3.fc.weight: error out of line" in result.stderr
    assert "keep  blocks.0.small.weight: too small to gain" in result.stderr
    assert load(tmp_path / "out").stated.keys() == {f"blocks.{i}.fc" for i in range(8) if i != 3}
    assert lrq.verify(tmp_path / "out", source).ok
    recorded = json.loads(load(tmp_path / "out").metadata["lrq"])["settings"]
    assert list(recorded["layers"]) == ["blocks.3.fc"] and recorded["heur"]


def test_a_rule_of_the_users_is_above_the_heuristics(tmp_path):
    source = save(tmp_path / "in", {"a.weight": normal(16, 16), "b.weight": normal(512, 512)})
    flags = ("--heur", "--simple", "--custom-layers", "a", "--custom-type", "nvfp4")
    assert run("convert", "-i", source, "-o", tmp_path / "out", *flags).exit_code == 0
    assert load(tmp_path / "out").stated.keys() == {"a", "b"}


def test_max_error_widens_format_by_format(tmp_path):
    """NVFP4 leaves 0.09 of Gaussian weights, MXFP8 0.026; what has 16 values in a row of zeros is exact in both."""
    tensors = {"a.weight": normal(64, 64), "b.weight": torch.eye(64), "c.weight": normal(64, 64, seed=1)}
    source = save(tmp_path / "in", tensors)
    found = {}
    for limit in ("0.2", "0.05", "0.01"):
        flags = (
            "--nvfp4",
            "--simple",
            "--max_error",
            limit,
            "--custom-layers",
            "c",
            "--custom-type",
            "nvfp4",
            "--verbose",
        )
        result = run("convert", "-i", source, "-o", tmp_path / limit, *flags)
        assert result.exit_code == 0, result.output
        found[limit] = {name: marker["format"] for name, marker in load(tmp_path / limit).stated.items()}
        assert lrq.verify(tmp_path / limit, source).ok
    kept = {"b": "nvfp4", "c": "nvfp4"}
    assert found == {"0.2": {"a": "nvfp4", **kept}, "0.05": {"a": "mxfp8", **kept}, "0.01": kept}
    assert re.search(r"keep  a.weight: --max_error 0.01: 0.0\d+ in nvfp4; 0.0\d+ in mxfp8", result.stderr)


@pytest.mark.parametrize("flags", [("--int8",), ("--int8", "--scaling_mode", "row", "--convrot"), ()])
def test_max_error_of_other_formats_leads_to_the_source(tmp_path, flags):
    source = save(tmp_path / "in", {"a.weight": normal(64, 64), "b.weight": torch.full((64, 64), 0.5)})
    assert (
        run("convert", "-i", source, "-o", tmp_path / "out", *flags, "--simple", "--max_error", "0.004").exit_code == 0
    )
    assert load(tmp_path / "out").stated.keys() == {"b"} and lrq.verify(tmp_path / "out", source).ok


def test_max_error_leaves_the_flags_of_a_layer(tmp_path):
    source = save(tmp_path / "in", {"a.weight": normal(64, 64), "b.weight": torch.eye(64)})
    flags = ("--nvfp4", "--full_precision_matrix_mult", "--simple", "--max_error", "0.05")
    assert run("convert", "-i", source, "-o", tmp_path / "out", *flags).exit_code == 0
    stated = load(tmp_path / "out").stated
    assert stated["a"]["format"] == "mxfp8" and all(marker["full_precision_matrix_mult"] for marker in stated.values())


@pytest.mark.parametrize("name", FORMATS)
def test_errors_do_not_hang_on_the_part_that_is_rounded_at_a_time(monkeypatch, name):
    w = normal(2, 384, 256).bfloat16()
    whole = relative_error(FORMATS[name], w[0])
    monkeypatch.setattr(heuristics, "PART", 128 * 256)
    assert relative_error(FORMATS[name], w[0]) == pytest.approx(whole, rel=1e-5)
    if FORMATS[name].refusal(tuple(w.shape)) is None:
        assert relative_error(FORMATS[name], w * torch.tensor([[[1.0]], [[0.0]]])) == pytest.approx(whole, rel=1e-5)


def test_an_error_that_none_keeps_to_is_said_once_with_a_count(tmp_path):
    source = save(tmp_path / "in", {f"l{i}.weight": normal(64, 64, seed=i) for i in range(7)})
    flags = ("--nvfp4", "--max_error", "0")
    lines = [
        run(*command, *flags).stderr
        for command in (
            ("plan", source, "--measure"),
            ("plan", source, "--measure", "--json"),
            ("convert", "-i", source),
        )
    ]
    assert len(set(lines)) == 1
    assert re.fullmatch(
        r"error: .* no layer can be quantized \(7 layers: --max_error 0: 0\.\d+ in nvfp4; 0\.\d+ in mxfp8\)\n", lines[0]
    )
    assert run("plan", source, "--measure", *flags).exit_code == 2 and run("plan", source, *flags).exit_code == 0


def test_a_plan_says_what_measuring_may_still_change(tmp_path):
    source = save(tmp_path / "in", {f"l{i}.weight": normal(256, 256, seed=i) for i in range(3)})

    def said(*flags: str) -> list[str]:
        words = run("plan", source, "--nvfp4", *flags).stdout.splitlines()
        return [line.removeprefix("notice: ") for line in words if "measures weights" in line]

    (heur,), (error,) = said("--heur"), said("--max_error", "0.2")
    assert "--heur also measures weights when it converts: layers whose error is out of line stay as they are" in heur
    assert "layers with too large an error become wider" in error and len(said("--heur", "--max_error", "0.2")) == 2
    assert not said() and not said("--heur", "--measure") and not said("--heur", "--target_bits", "6")
    assert not said("--heur", "--custom_layers", ".", "--custom_type", "nvfp4")
    assert said("--heur", "--custom_layers", "l1", "--custom_type", "nvfp4")
