"""``input_scale``: written in the conversion or patched later, from statistics or given; activations no longer clip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lrq
from checkpoints import LAYERS, File, convert, load, normal, run, same_bytes, save, tampered, transformer
from lrq.calibration.stats import load_stats
from lrq.errors import InputError
from measured import inputs, save_for

COLUMNS = {"attn.qkv": 32, "mlp.fc": 64}


def samples() -> dict[str, torch.Tensor]:
    """Inputs that leave E4M3 by far."""
    return {name: 900 * inputs(400, COLUMNS[name[9:]], seed=7 * i) for i, name in enumerate(LAYERS)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "in.safetensors", transformer())


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    return save_for(tmp_path / "stats.safetensors", samples())


def loaded_output(file: File, layer: str, x: torch.Tensor) -> torch.Tensor:
    """A layer's output as ComfyUI computes it in FP8: inputs over input_scale (1 without one), clamped, rounded."""
    weight = file.tensors[f"{layer}.weight"].float() * file.tensors[f"{layer}.weight_scale"]
    scale = file.tensors.get(f"{layer}.input_scale", torch.tensor(1.0))
    rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return rounded @ weight.T


def test_activations_above_448_no_longer_clip(tmp_path: Path, source: Path, stats: Path) -> None:
    convert(source, tmp_path / "dynamic.safetensors", "--calib", stats, "--bias_correction", "off")
    convert(source, tmp_path / "static.safetensors", "--calib", stats, "--bias_correction", "off", "--actcal")
    before, after = load(tmp_path / "dynamic.safetensors"), load(tmp_path / "static.safetensors")
    for layer, x in samples().items():
        assert x.abs().amax() > 2000
        exact = x @ (after.tensors[f"{layer}.weight"].float() * after.tensors[f"{layer}.weight_scale"]).T
        clipped, scaled = ((loaded_output(file, layer, x) - exact).norm() / exact.norm() for file in (before, after))
        assert clipped > 0.2 and scaled < 0.05
    assert run("verify", tmp_path / "static.safetensors", "--source", source).exit_code == 0


@pytest.mark.parametrize("flags,largest", [((), 448.0), (("--nvfp4",), 2688.0)])
def test_the_scale_is_the_largest_input_over_the_largest_number(tmp_path, source, stats, flags, largest) -> None:
    convert(source, tmp_path / "max.safetensors", *flags, "--calib", stats, "--actcal")
    convert(source, tmp_path / "most.safetensors", *flags, "--calib", stats, "--actcal", "--actcal-percentile", "99")
    for layer, x in samples().items():
        one = load(tmp_path / "max.safetensors").tensors[f"{layer}.input_scale"]
        assert one.dtype == torch.float32 and one.shape == ()
        assert one.item() == pytest.approx(x.abs().amax().item() / largest, rel=1e-6)
        most = load(tmp_path / "most.safetensors").tensors[f"{layer}.input_scale"].item() * largest
        exact = x.abs().flatten().quantile(0.99).item()
        assert 0.98 * exact <= most <= 1.14 * exact


@pytest.mark.parametrize("flags", [("--mxfp8",), ("--int8",), ("--scaling_mode", "row")])
def test_other_formats_have_none(tmp_path: Path, source: Path, stats: Path, flags: tuple[str, ...]) -> None:
    said = convert(source, tmp_path / "out.safetensors", *flags, "--calib", stats, "--actcal")
    assert not [name for name in load(tmp_path / "out.safetensors").tensors if name.endswith("input_scale")]
    assert "--actcal: no layer has both" in said.output


@pytest.mark.parametrize("how", ["json", "suffixed", "checkpoint"])
def test_scales_are_taken_from_a_file(tmp_path: Path, source: Path, stats: Path, how: str) -> None:
    path = tmp_path / ("scales.json" if how != "checkpoint" else "scales.safetensors")
    if how == "checkpoint":
        save(path, {f"{LAYERS[0]}.input_scale": torch.tensor([0.25]), "other": torch.ones(2)})
    else:
        path.write_text(json.dumps({LAYERS[0] + (".input_scale" if how == "suffixed" else ""): 0.25}))
    convert(source, tmp_path / "out.safetensors", "--calib", stats, "--actcal", "--input_scales", path)
    tensors = load(tmp_path / "out.safetensors").tensors
    assert tensors[f"{LAYERS[0]}.input_scale"].item() == 0.25
    assert tensors[f"{LAYERS[1]}.input_scale"].item() != 0.25
    assert run("verify", tmp_path / "out.safetensors", "--source", source).exit_code == 0
    convert(source, tmp_path / "alone.safetensors", "--input_scales", path)
    alone = load(tmp_path / "alone.safetensors").tensors
    assert [name for name in alone if name.endswith("input_scale")] == [f"{LAYERS[0]}.input_scale"]


@pytest.mark.parametrize("flags", [(), ("--nvfp4", "--scale_search", "off")])
def test_a_patched_file_is_that_file_and_scales(tmp_path: Path, source: Path, stats: Path, flags) -> None:
    convert(source, tmp_path / "plain.safetensors", *flags)
    result = run("actscale", tmp_path / "plain.safetensors", "--calib", stats, "-o", tmp_path / "patched.safetensors")
    assert result.exit_code == 0 and "4 input scales" in result.output
    convert(source, tmp_path / "at-once.safetensors", *flags, "--calib", stats, "--actcal", "--bias_correction", "off")
    plain, patched, at_once = (load(tmp_path / f"{n}.safetensors") for n in ("plain", "patched", "at-once"))
    assert (
        patched.tensors.keys() == at_once.tensors.keys() == plain.tensors.keys() | {f"{n}.input_scale" for n in LAYERS}
    )
    assert all(same_bytes(patched.tensors[name], tensor) for name, tensor in at_once.tensors.items())
    assert all(same_bytes(patched.tensors[name], tensor) for name, tensor in plain.tensors.items())
    assert patched.stated == plain.stated
    assert run("verify", tmp_path / "patched.safetensors", "--source", source).exit_code == 0
    again = run(
        *("actscale", tmp_path / "patched.safetensors", "--calib", stats, "--actcal-percentile", 90),
        *("-o", tmp_path / "again.safetensors"),
    )
    assert again.exit_code == 0
    other = load(tmp_path / "again.safetensors")
    differing = {n for n, t in patched.tensors.items() if not same_bytes(other.tensors[n], t)}
    assert differing == {f"{n}.input_scale" for n in LAYERS}


def _negative(file: File) -> None:
    file.tensors[f"{LAYERS[0]}.input_scale"] = torch.tensor(-1.0)


def _half(file: File) -> None:
    file.tensors[f"{LAYERS[0]}.input_scale"] = torch.tensor(1.0).half()


def _gone(file: File) -> None:
    del file.tensors[f"{LAYERS[0]}.input_scale"]


@pytest.mark.parametrize("change,word", [(_negative, "positive number"), (_half, "must be F32"), (_gone, "missing")])
def test_verify_sees_scales_that_are_wrong(tmp_path: Path, source: Path, stats: Path, change, word: str) -> None:
    convert(source, tmp_path / "out.safetensors", "--calib", stats, "--actcal")
    result = run("verify", tampered(tmp_path / "out.safetensors", change), "--source", source)
    assert result.exit_code == 1 and word in result.output


WRONG = {
    "--actcal": "--actcal: needs the statistics of --calib",
    "--add-bias": "--add_bias: needs the statistics of --calib",
    "--calib S --add_bias --bias-correction off": "--add_bias: has no meaning with --bias_correction off",
    "--calib S --actcal --actcal-percentile 20": "--actcal_percentile: must be from 50.0 to 100.0",
    "--input_scales missing.json": "missing.json: can't be read",
    "--input_scales J": "its input scale must be a positive number, is 'x'",
}


@pytest.mark.parametrize("flags", WRONG)
def test_flags_that_have_no_meaning(tmp_path: Path, source: Path, stats: Path, flags: str) -> None:
    (tmp_path / "bad.json").write_text('{"a": "x"}')
    given = [{"S": str(stats), "J": str(tmp_path / "bad.json")}.get(word, word) for word in flags.split()]
    result = run("convert", "-i", source, "-o", tmp_path / "out.safetensors", *given)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and WRONG[flags] in line, line
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_to_patch_is_one_line(tmp_path: Path, source: Path, stats: Path) -> None:
    convert(source, tmp_path / "int8.safetensors", "--int8")
    convert(source, tmp_path / "fp8.safetensors")
    other = save_for(tmp_path / "other.safetensors", {"else": normal(9, 8)})
    cases = [
        (("int8.safetensors", "--calib", stats), "no FP8 or NVFP4 layer"),
        (("fp8.safetensors", "--calib", other), "of another model"),
        (("fp8.safetensors",), "needs --calib STATS or --input_scales FILE"),
        (("in.safetensors", "--calib", stats), "no FP8 or NVFP4 layer"),
    ]
    for (name, *rest), word in cases:
        result = run("actscale", tmp_path / name, *rest, "-o", tmp_path / "out.safetensors")
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and word in line, line
        assert not (tmp_path / "out.safetensors").exists()
    same = run("actscale", tmp_path / "fp8.safetensors", "--calib", stats, "-o", tmp_path / "fp8.safetensors")
    assert same.exit_code == 2 and "same file" in same.output
    assert lrq.verify(tmp_path / "fp8.safetensors", source).ok


@pytest.mark.parametrize("flags", [("--calib", "S", "--actcal"), ()])
def test_a_scale_that_was_patched_in_is_held_against_what_it_was_made_of(tmp_path, source, stats, flags) -> None:
    output, patched, again = (tmp_path / f"{name}.safetensors" for name in ("out", "patched", "again"))
    convert(source, output, *[str(stats) if flag == "S" else flag for flag in flags], "--simple")

    def verified(file: Path):
        return run("verify", file, "--source", source, "--calib", stats)

    assert run("actscale", output, "--calib", stats, "--actcal_percentile", "90", "-o", patched).exit_code == 0
    assert verified(output).exit_code == verified(patched).exit_code == 0
    largest = load_stats(stats)[LAYERS[0]].amax / 448
    assert load(patched).tensors[f"{LAYERS[0]}.input_scale"] < 0.99 * largest

    def change(file: File) -> None:
        file.tensors[f"{LAYERS[0]}.input_scale"] *= 3

    result = verified(tampered(patched, change))
    assert result.exit_code == 1 and "input_scale is" in result.output
    # What is given is given, whatever the statistics say; the other layers are held against them.
    (tmp_path / "given.json").write_text(json.dumps({LAYERS[0]: 0.5}))
    assert run("actscale", patched, "--input_scales", tmp_path / "given.json", "-o", again).exit_code == 0
    assert verified(again).exit_code == 0
    recorded = json.loads(load(again).metadata["lrq"])["calibration"]["patched_scales"]
    assert [len(patch["layers"]) for patch in recorded] == [len(LAYERS) - 1, 1]


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("x.json", '{"weight_map": {}}', "is an index of shards"),
        ("x.json", '{"a": 1, "a": 2}', "duplicate key 'a'"),
    ],
)
def test_a_file_of_scales_that_is_none_is_one_line(tmp_path, source, name, text, word) -> None:
    (tmp_path / name).write_text(text)
    result = run("convert", "-i", source, "-o", tmp_path / "o", "--simple", "--input_scales", tmp_path / name)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and word in line


def test_a_percentile_that_is_no_number_is_refused(tmp_path, source, stats) -> None:
    output = tmp_path / "out.safetensors"
    convert(source, output, "--simple")
    result = run("actscale", output, "--calib", stats, "--actcal_percentile", "nan", "-o", tmp_path / "p")
    assert result.exit_code == 2 and "must be from 50 to 100" in result.stderr


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_scales_of_a_file_must_be_floats(tmp_path, source, dtype) -> None:
    given = save(tmp_path / "given", {f"{LAYERS[0]}.input_scale": torch.ones(()).to(dtype)})
    result = run("convert", "-i", source, "-o", tmp_path / "o", "--simple", "--input_scales", given)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "must be a float, is torch." in line


def test_without_permission_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lrq.calibration.stats.safe_open", lambda *_: (_ for _ in ()).throw(PermissionError()))
    (tmp_path / "there").write_text("x")
    for name, words in (("there", "no permission"), ("missing", "no such file")):
        with pytest.raises(InputError, match=words):
            load_stats(tmp_path / name)
