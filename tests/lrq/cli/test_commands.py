"""The commands as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click import Option
from click.testing import CliRunner
from rich.console import Console

from checkpoints import FLAGS, LAYERS, STOCK, convert, load, normal, run, save, tampered, transformer
from lrq import __version__
from lrq.cli import convert_to_quant, main, tables


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "model.safetensors", transformer())


def recorded(path) -> dict:
    """The settings in the output's provenance."""
    return json.loads(load(path).metadata["lrq"])["settings"]


@pytest.mark.parametrize("name", FLAGS)
def test_the_output_is_named_after_the_format(tmp_path, source, name):
    result = run("convert", "-i", source, "--simple", *FLAGS[name])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({source.name, f"model-{name}.safetensors"})
    assert f"model-{name}.safetensors" in result.stderr


def test_an_input_without_the_usual_ending_gets_an_output_with_it(tmp_path):
    source = save(tmp_path / "checkpoint", transformer())
    assert run("convert", "-i", source, "--simple").exit_code == 0
    assert (tmp_path / "checkpoint-fp8.safetensors").is_file()


def test_an_existing_output_is_replaced(tmp_path, source):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    convert(source, target)
    assert load(target).stated.keys() == set(LAYERS)


SPELLINGS = [
    ("--block_size", "--block-size", "8"),
    ("--scaling_mode", "--scaling-mode", "block"),
    ("--num_iter", "--num-iter", "7"),
    ("--top_p", "--top-p", "0.3"),
    ("--min_k", "--min-k", "3"),
    ("--max_k", "--max-k", "300"),
    ("--exclude_layers", "--exclude-layers", "qkv"),
]


@pytest.mark.parametrize("spelling", [0, 1], ids=["underscore", "dash"])
@pytest.mark.parametrize("equals", [False, True], ids=["space", "equals"])
def test_long_flags_take_dash_and_underscore(tmp_path, source, spelling, equals):
    flags = [("--comfy_quant", "--comfy-quant")[spelling], "--int8"]
    for words in SPELLINGS:
        flags += [f"{words[spelling]}={words[2]}"] if equals else [words[spelling], words[2]]
    convert(source, tmp_path / "out.safetensors", *flags)
    settings = recorded(tmp_path / "out.safetensors")
    for underscored, _, value in SPELLINGS:
        assert str(settings[underscored.removeprefix("--")]) in (value, str([value]))
    assert settings["int8"] and settings["comfy_quant"] and settings["simple"]


def test_convrot_takes_both_spellings(tmp_path, source):
    flags = ("--int8", "--scaling_mode", "row", "--convrot")
    for spelling in ("--convrot-group-size", "--convrot_group_size"):
        convert(source, tmp_path / "out.safetensors", *flags, spelling, "16")
        assert recorded(tmp_path / "out.safetensors")["convrot_group_size"] == 16


def test_a_value_that_looks_like_a_flag_is_not_respelled(tmp_path):
    source = save(tmp_path / "in.safetensors", {"a-b.weight": normal(8, 8), "c.weight": normal(8, 8)})
    convert(source, tmp_path / "out.safetensors", "--exclude-layers=a-b")
    assert load(tmp_path / "out.safetensors").stated.keys() == {"c"}


def test_int8_with_a_block_size_is_block_scaling(tmp_path, source):
    convert(source, tmp_path / "a", "--int8", "--block_size", "16")
    convert(source, tmp_path / "b", "--int8", "--scaling_mode", "block", "--block_size", "16")
    assert load(tmp_path / "a").stated == load(tmp_path / "b").stated
    assert load(tmp_path / "a").stated[LAYERS[0]] == {"format": "int8_blockwise", "group_size": 16}


@pytest.mark.parametrize("name", FLAGS)
def test_a_format_that_stock_comfyui_cannot_load_is_announced_in_one_line(tmp_path, source, name):
    lines = convert(source, tmp_path / "out.safetensors", *FLAGS[name]).stderr.splitlines()
    notices = [line for line in lines if "ComfyUI" in line]
    assert len(notices) == (0 if name in STOCK else 1)
    assert all("ComfyUI-QuantOps" in line and "stock ComfyUI can't load" in line for line in notices)


def test_the_summary_names_every_layer_whose_shape_does_not_fit(tmp_path):
    tensors = {"a.weight": normal(16, 32), "b.weight": normal(5, 16), "c.weight": normal(16, 20)}
    source = save(tmp_path / "in.safetensors", tensors)
    words = convert(source, tmp_path / "out.safetensors", "--int8", "--block_size", "16").stderr
    refused = re.findall(r"kept as it is  (\S+): (.*)", words)
    rule = "N and K must be multiples of the block 16, got"
    assert refused == [("b.weight", f"{rule} 5 x 16"), ("c.weight", f"{rule} 16 x 20")]
    assert "1 layer to int8-block" in words


def test_the_summary_counts_what_is_kept_and_why(tmp_path, source):
    words = convert(source, tmp_path / "out.safetensors", "--exclude-layers", "mlp").stderr
    assert "2 layers to fp8" in words
    assert "excluded by --exclude_layers (2)" in words and "embedding (1)" in words and "4-D (2)" in words


def test_excluding_twice_excludes_both(tmp_path, source):
    convert(source, tmp_path / "out", "--exclude-layers", "qkv", "--exclude_layers", LAYERS[-1])
    assert load(tmp_path / "out").stated.keys() == {name for name in LAYERS[:-1] if "qkv" not in name}


def test_a_bank_of_experts_that_no_loader_would_find_is_counted(tmp_path, source):
    tensors = {**transformer(), "blocks.0.mlp.experts.down_proj": normal(4, 16, 32)}
    words = convert(save(tmp_path / "moe.safetensors", tensors), tmp_path / "out").stderr
    assert "bank of experts without .weight in its name: no loader would find its scales (1)" in words


def test_a_file_that_is_replaced_is_named(tmp_path, source):
    target = tmp_path / "out.safetensors"
    assert "replaced the file" not in convert(source, target).stderr
    assert f"notice: {target}: replaced the file that was there" in convert(source, target).stderr


def test_verbose_says_what_becomes_of_every_tensor(tmp_path, source):
    words = convert(source, tmp_path / "out.safetensors", "--verbose").stderr
    for name in transformer():
        layer = name.removesuffix(".weight")
        assert f"fp8  {layer} [" in words if layer in LAYERS else f"keep  {name}: " in words


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    tensors = {"a\x1b[2J\n.weight": normal(16, 16), "b\x1b.weight": normal(3, 3)}
    source = save(tmp_path / "in.safetensors", tensors)
    result = convert(source, tmp_path / "out\x1b.safetensors", "--verbose", "--int8", "--block_size", "16")
    again = run("verify", tmp_path / "out\x1b.safetensors", "--source", source)
    assert again.exit_code == 0
    for words in (result.output, again.output):
        assert "\x1b" not in words and "\\x1b" in words


def test_the_two_names_of_the_command_write_the_same_bytes(tmp_path, source):
    convert(source, tmp_path / "a", "--nvfp4")
    args = ["-i", str(source), "-o", str(tmp_path / "b"), "--nvfp4", "--simple"]
    assert CliRunner().invoke(convert_to_quant, args).exit_code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_real_process_converts_and_verifies(tmp_path, source):
    target = tmp_path / "out.safetensors"
    lrq = [sys.executable, "-m", "lrq.cli"]
    done = subprocess.run(
        [*lrq, "convert", "-i", source, "-o", target, "--mxfp8", "--comfy_quant"], capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    done = subprocess.run([*lrq, "verify", target, "--source", source, "--json"], capture_output=True)
    assert done.returncode == 0 and json.loads(done.stdout)["ok"] and done.stderr == b""


def test_verify_prints_a_line_for_every_layer_and_the_total(tmp_path, source):
    convert(source, tmp_path / "out.safetensors", "--nvfp4")
    result = run("verify", tmp_path / "out.safetensors", "--source", source)
    assert result.exit_code == 0 and result.stderr == ""
    for layer in LAYERS:
        assert re.search(rf"{re.escape(layer)} .*nvfp4.* \d+ x \d+ .* \d\.\d{{4}} ", result.stdout)
    assert "4 layers" in result.stdout and result.stdout.rstrip().endswith("out.safetensors: ok")


def test_verify_without_a_source_measures_nothing(tmp_path, source):
    convert(source, tmp_path / "out.safetensors", "--nvfp4")
    result = run("verify", tmp_path / "out.safetensors", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["ok"] and report["total"] is None
    assert [layer["error"] for layer in report["layers"]] == [None] * 4


def test_verify_json_has_the_errors_of_every_layer(tmp_path, source):
    convert(source, tmp_path / "out.safetensors", "--int8")
    report = json.loads(run("verify", tmp_path / "out.safetensors", "--source", source, "--json").stdout)
    assert report["file"] == str(tmp_path / "out.safetensors") and report["failures"] == []
    assert report["unchanged_tensors"] == len(transformer()) - len(LAYERS)
    assert {layer["name"]: tuple(layer["shape"]) for layer in report["layers"]} == {
        layer: tuple(transformer()[f"{layer}.weight"].shape) for layer in LAYERS
    }
    for error in (report["total"], *(layer["error"] for layer in report["layers"])):
        assert 0.002 < error["frobenius"] < 0.05 and error["frobenius_ratio"] == error["projected_ratio"] == 1


def test_verify_json_stays_json_without_any_error(tmp_path):
    source = save(tmp_path / "in.safetensors", {"a.weight": torch.zeros(16, 16)})
    convert(source, tmp_path / "out.safetensors", "--nvfp4")
    report = json.loads(run("verify", tmp_path / "out.safetensors", "--source", source, "--json").stdout)
    assert report["ok"] and report["layers"][0]["error"] == {
        "frobenius": 0,
        "projected_error": 0,
        "sqnr": None,
        "frobenius_ratio": 1,
        "projected_ratio": 1,
    }


def test_verify_exits_with_1_and_says_what_failed(tmp_path, source):
    convert(source, tmp_path / "out.safetensors")
    bad = tampered(tmp_path / "out.safetensors", lambda file: file.tensors.pop(f"{LAYERS[0]}.weight_scale"))
    for flags in ((), ("--source", source), ("--json",)):
        result = run("verify", bad, *flags)
        assert result.exit_code == 1
        assert result.stderr == f"failed: layer {LAYERS[0]}: weight_scale missing\n"
    assert json.loads(result.stdout)["failures"] == [f"layer {LAYERS[0]}: weight_scale missing"]


def test_help_version_and_backends():
    words = run("convert", "--help")
    assert words.exit_code == 0
    flags = ("-i", "-o", "--comfy_quant", "--int8", "--nvfp4", "--mxfp8", "--scaling_mode", "--block_size", "--convrot")
    flags += ("--convrot_group_size", "--simple", "--num_iter", "--top_p", "--min_k", "--max_k", "--exclude_layers")
    for flag in (*flags, "--device", "--seed", "--verbose"):
        assert re.search(rf"(?m)^ +.*{flag}\b", words.stdout), flag
    assert __version__ in run("--version").stdout
    found = json.loads(run("backends", "--json").stdout)
    assert set(found["quantize_nvfp4"]) >= {"reference"} and run("backends").exit_code == 0


def test_a_narrow_terminal_keeps_the_names_of_layers_whole(tmp_path, source, monkeypatch):
    convert(source, tmp_path / "out.safetensors", "--nvfp4", "--simple")
    monkeypatch.setattr(tables, "console", lambda: Console(width=80))
    result = run("verify", tmp_path / "out.safetensors", "--source", source)
    assert all(layer in result.stdout for layer in LAYERS)
    assert max(map(len, result.stdout.splitlines())) <= 80 + len(str(tmp_path))


def test_verify_shows_the_first_failures_and_counts_the_rest(tmp_path, source):
    convert(source, tmp_path / "out.safetensors", "--nvfp4", "--simple")
    many = {f"blocks.{i}.norm.weight": normal(8) for i in range(30)}
    save(tmp_path / "other.safetensors", load(source).tensors | many)
    unsigned = tampered(tmp_path / "out.safetensors", lambda file: file.metadata.pop("lrq"))
    result = run("verify", unsigned, "--source", tmp_path / "other.safetensors")
    lines = result.stderr.splitlines()
    assert result.exit_code == 1 and len(lines) == 21
    assert re.fullmatch(r"\.\.\. and \d+ more \(--json lists all\)", lines[-1])


def test_flags_have_one_spelling_in_help_and_documents():
    options = {name for command in main.commands.values() for one in command.params for name in one.opts}
    spelled = {name.replace("-", "_"): name for name in options if name.startswith("--")}
    root = Path(__file__).parents[3]
    texts = [(root / name).read_text() for name in ("README.md", "CHANGELOG.md", "docs/FORMATS.md")]
    helps = [one.help or "" for command in main.commands.values() for one in command.params if isinstance(one, Option)]
    found = {name for text in (*texts, *helps) for name in re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text)}
    known = {name: spelled[name.replace("-", "_")] for name in found if name.replace("-", "_") in spelled}
    assert len(known) > 40 and {name: right for name, right in known.items() if name != right} == {}


def test_a_dry_run_takes_either_spelling(source):
    for flag in ("--dry-run", "--dry_run"):
        assert "size: " in run("convert", "-i", source, flag).stdout
