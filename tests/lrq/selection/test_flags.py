"""Flags that choose layers and formats: what is wrong with them is one line, and no file is left."""

from __future__ import annotations

import pytest

import lrq
from checkpoints import normal, run, save
from lrq.errors import InputError

WRONG = {
    "--heur": "no layer can be quantized (1 layer: too small to gain: 2048 weights, under 65536)",
    "--preset flux": "--preset flux1: finds no layer in",
    "--preset nosuch": "--preset nosuch: no such preset; known are",
    "--preset qwen_imag": "did you mean qwen_image?",
    "--preset none --wan": "--preset none: has no meaning beside another preset",
    "--preset missing.toml": "--preset missing.toml: can't be read",
    "--layer-config missing.json": "--layer_config missing.json: can't be read",
    "--custom-layers fc": "--custom_layers: needs --custom_type as well",
    "--custom-type fp8": "--custom_type: needs --custom_layers as well",
    "--custom-layers fc --custom-type nvfp5": "no such format 'nvfp5'; did you mean nvfp4?",
    "--custom-layers fd --custom-type fp8": "finds no layer in",
    "--fallback f8": "--fallback: no such format 'f8'; did you mean fp8?",
    "--exclude-layers fd": "the nearest name is fc",
    "--fullmatch --exclude-layers fc": "finds no layer to exclude",
    "--plan missing.json": "--plan missing.json: can't be read",
    "--plan missing.json --nvfp4": "--plan missing.json: has all settings; leave --nvfp4 away",
    "--dry-run nothing": "'nothing' is not one of",
    "--max_error -1": "--max_error: must be at least 0.0, got -1",
    "--max_error nan": "--max_error: must be at least 0.0, got nan",
}


@pytest.mark.parametrize("flags", WRONG)
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_flags_that_have_no_meaning(tmp_path, command, flags):
    if command == "plan" and flags.startswith(("--plan", "--dry-run", "--heur")):
        pytest.skip("not a flag of the plan, or no error there")
    source = save(tmp_path / "in.safetensors", {"blocks.0.fc.weight": normal(32, 64), "blocks.0.fc.bias": normal(32)})
    result = run(command, *(("-i", source) if command == "convert" else (source,)), *flags.split())
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: ") and WRONG[flags] in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": 5},
        {"preset": [5]},
        {"preset": "nosuch"},
        {"preset": {"about": 1}},
        {"layers": [1]},
        {"layers": {"blocks.0.fc": 5}},
        {"layers": {"nowhere": {"skip": True}}},
        {"layer_config": "missing.json"},
        {"layer_config": {"(": {"skip": True}}},
        {"fallback": 8},
        {"fullmatch": "yes"},
        {"custom_layers": "fc", "custom_type": "fp9"},
        {"max_error": "0.1"},
    ],
    ids=str,
)
def test_the_call_refuses_what_has_no_meaning(tmp_path, settings):
    source = save(tmp_path / "in.safetensors", {"blocks.0.fc.weight": normal(32, 64)})
    with pytest.raises(InputError) as caught:
        lrq.quantize(source, tmp_path / "out.safetensors", simple=True, **settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.safetensors").exists()
