"""Statistics without a run: those of normal numbers behind norms, activation functions and LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import normal, run, save
from lrq.calibration.activations import FUNCTIONS, activated, features_of, gated
from lrq.calibration.lora import layers_of_lora, with_directions
from lrq.calibration.simulate import deviations, from_norm, fronts, standard_normal
from lrq.calibration.stats import load_stats
from lrq.checkpoint.reader import Reader
from lrq.errors import InputError
from lrq.models.preset import presets
from lrq.selection.simulated import SimulatedInputs

TOKENS = 20000
LLAMA = {
    "model.embed_tokens.weight": normal(64, 32, seed=1),
    "model.layers.0.self_attn.q_proj.weight": normal(32, 32, seed=2),
    "model.layers.0.self_attn.k_proj.weight": normal(32, 32, seed=3),
    "model.layers.0.input_layernorm.weight": normal(32, seed=4),
    "model.layers.0.post_attention_layernorm.weight": normal(32, seed=5),
    "model.layers.0.mlp.gate_proj.weight": normal(48, 32, seed=6) * 0.2,
    "model.layers.0.mlp.up_proj.weight": normal(48, 32, seed=7) * 0.2,
    "model.layers.0.mlp.down_proj.weight": normal(32, 48, seed=8),
}


def inputs_and_draw() -> tuple[object, torch.Tensor]:
    gain, bias = normal(64, seed=1), normal(64, seed=2) * 0.3
    return from_norm(gain, bias), normal(TOKENS, 64, seed=3) * gain + bias


def close(found, drawn: torch.Tensor) -> None:
    spread = drawn.square().mean(0).sqrt()
    assert ((found.mean - drawn.mean(0)).abs() < 0.04 * spread).all()
    assert ((found.second / drawn.square().mean(0)).log().abs() < 0.12).all()
    for percent in (50.0, 90.0, 99.0):
        assert found.percentile(percent) == pytest.approx(drawn.abs().quantile(percent / 100).item(), rel=0.2)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_an_activation_gives_is_what_draws_give(function: str) -> None:
    inputs, x = inputs_and_draw()
    weight, bias = normal(24, 64, seed=4) * 0.2, normal(24, seed=5) * 0.5
    found = activated(function, features_of(weight, bias, inputs), 64, 4.0)
    close(found, FUNCTIONS[function](x @ weight.mT + bias)[:, :24].float())


@pytest.mark.parametrize("alike", [False, True])
def test_a_gate_and_what_it_opens_go_together(alike: bool) -> None:
    inputs, x = inputs_and_draw()
    gate = normal(24, 64, seed=4) * 0.2
    up = gate + normal(24, 64, seed=6) * 0.05 if alike else normal(24, 64, seed=6) * 0.2
    found = gated("silu", (gate, None), (up, None), inputs, 64, 4.0)
    close(found, torch.nn.functional.silu(x @ gate.mT) * (x @ up.mT))


def test_every_activation_of_a_preset_is_known() -> None:
    named = {preset.activation for preset in presets().values()}
    assert named - {""} <= FUNCTIONS.keys() and {"gelu", "silu"} <= named


def test_layers_behind_norms_and_activations_are_known(tmp_path: Path) -> None:
    with Reader(save(tmp_path / "in.safetensors", LLAMA)) as reader:
        found = SimulatedInputs(reader, "norms")
        names = {name.removeprefix("model.layers.0.") for name in found}
        assert names == {f"{one}_proj" for one in ("self_attn.q", "self_attn.k", "mlp.gate", "mlp.up", "mlp.down")}
        down = found["model.layers.0.mlp.down_proj"]
        inputs = from_norm(LLAMA["model.layers.0.post_attention_layernorm.weight"], None)
        pair = [(LLAMA[f"model.layers.0.mlp.{one}_proj.weight"], None) for one in ("gate", "up")]
        assert torch.equal(down.second, gated("silu", *pair, inputs, 64, deviations(64, 48)).second)
        assert found.size("model.layers.0.mlp.down_proj") == 8 * (2 * 48 + down.histogram.numel())
        assert not found.measured and found.digest() != SimulatedInputs(reader, "norms", 65).digest()


def test_an_activation_that_no_preset_names_is_not_guessed(tmp_path: Path) -> None:
    tensors = {name: w for name, w in LLAMA.items() if "q_proj" not in name}
    with Reader(save(tmp_path / "in.safetensors", tensors)) as reader:
        assert "model.layers.0.mlp.down_proj" not in SimulatedInputs(reader, "norms")
    assert fronts(["layers.0.mlp.down_proj.weight", "layers.0.mlp.gate_proj.weight"]) == {}


def test_gaussian_inputs_are_those_of_every_layer_without_noise(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", LLAMA | {"model.layers.0.experts.weight": normal(2, 8, 8)})
    amax = []
    for tokens in ("64", "4096"):
        output = tmp_path / f"{tokens}.safetensors"
        flags = ("--inputs", "gaussian", "--calib-samples", tokens)
        assert run("calibrate", "--simulate", source, *flags, "-o", output).exit_code == 0
        stats = load_stats(output)
        assert set(stats) == {name.removesuffix(".weight") for name, w in LLAMA.items() if w.dim() == 2}
        one = stats["model.layers.0.mlp.down_proj"]
        assert not one.mean.any() and torch.equal(one.second, torch.ones(48, dtype=torch.float64))
        amax.append(one.amax)
    assert 3 < amax[0] < amax[1] < 6


def test_the_largest_is_that_of_as_many_draws() -> None:
    drawn = torch.stack([normal(64, 48, seed=seed).abs().amax() for seed in range(200)])
    assert deviations(64, 48) == pytest.approx(drawn.median().item(), rel=0.03)
    assert standard_normal(48).amax == pytest.approx(deviations(64, 48))


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "transformer.double_blocks.0.img_attn.qkv.lora_A.default.weight",
        "base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "double_blocks.0.img_attn.qkv.lora.down.weight",
    ],
)
def test_a_lora_is_matched_however_it_is_named(name: str) -> None:
    layers = [
        "model.diffusion_model.double_blocks.0.img_attn.qkv",
        "model.diffusion_model.double_blocks.10.img_attn.qkv",
    ]
    up = name.replace("lora_A", "lora_B").replace("down", "up")
    assert layers_of_lora([name, up, "unrelated.lora_A.weight"], layers) == {layers[0]: name}


def test_half_of_the_second_moment_lies_where_a_lora_reads() -> None:
    stats, a = standard_normal(32), normal(4, 32, seed=3)
    found = with_directions(stats, a)
    assert found.vectors is not None and found.values is not None
    assert found.second.sum() == pytest.approx(32.0) and found.values.sum().item() == pytest.approx(16.0)
    shares = (a.double() @ found.vectors.double()).square().sum(0)
    torch.testing.assert_close((shares / shares.sum()).float(), found.values / found.values.sum(), rtol=1e-4, atol=0)
    assert with_directions(stats, torch.zeros(4, 32)) is stats
    for wrong, word in ((normal(4, 16), "must be"), (torch.full((4, 32), torch.inf), "not finite")):
        with pytest.raises(ValueError, match=word):
            with_directions(stats, wrong)


def test_a_lora_shapes_the_statistics_of_its_layers_alone(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", LLAMA)
    lora = {"lora_te_model_layers_0_mlp_down_proj.lora_down.weight": normal(4, 48, seed=9)}
    output, file = tmp_path / "s.safetensors", save(tmp_path / "lora.safetensors", lora)
    result = run("calibrate", "--simulate", source, "--actcal-lora", file, "-o", output)
    assert result.exit_code == 0, result.output
    stats = load_stats(output)
    assert [name for name in stats if stats[name].vectors is not None] == ["model.layers.0.mlp.down_proj"]
    broken = save(file, {name: normal(4, 8) for name in lora})
    with Reader(source) as reader, pytest.raises(InputError, match=r"lora_down.weight: A must be \[r,48\]"):
        SimulatedInputs(reader, "norms", lora=str(broken))["model.layers.0.mlp.down_proj"]


def converted(tmp_path: Path, *flags: object) -> tuple[object, Path]:
    source, output = save(tmp_path / "in.safetensors", LLAMA), tmp_path / "out.safetensors"
    result = run("convert", "-i", source, "-o", output, "--preset", "none", *flags)
    if result.exit_code == 0:
        assert run("verify", output, "--source", source).exit_code == 0
    return result, output


@pytest.mark.parametrize("family,largest", [((), 448.0), (("--nvfp4",), 448.0 * 6)])
def test_simulated_inputs_give_input_scales(tmp_path: Path, family: tuple[str, ...], largest: float) -> None:
    flags = (*family, "--simple", "--simulate", "gaussian", "--actcal", "--actcal-samples", "100")
    result, output = converted(tmp_path, *flags)
    assert result.exit_code == 0, result.output
    with Reader(output) as reader:
        found = reader.read("model.layers.0.mlp.down_proj.input_scale").item()
    assert found == pytest.approx(deviations(100, 48) / largest)


def test_flags_of_the_manual_that_nothing_needs_are_taken(tmp_path: Path) -> None:
    flags = ("--simple", "--simulate", "norms", "--actcal", "--actcal-seed", "42", "--actcal_device", "cuda")
    result, _ = converted(tmp_path, *flags)
    assert result.exit_code == 0
    for name in ("seed", "device"):
        assert f"notice: --actcal_{name} has no effect: " in result.stderr


def test_a_guess_moves_no_bias(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", LLAMA | {"model.layers.0.mlp.down_proj.bias": normal(32, seed=9)})
    output = tmp_path / "out.safetensors"
    assert run("convert", "-i", source, "-o", output, "--simulate", "norms", "--nvfp4").exit_code == 0
    with Reader(source) as before, Reader(output) as after:
        name = "model.layers.0.mlp.down_proj.bias"
        assert torch.equal(before.read(name), after.read(name))


@pytest.mark.parametrize(
    "flags,word",
    [
        (("--actcal",), "--actcal: needs the statistics of --calib, or --simulate gaussian or norms"),
        (("--calib", "x", "--simulate", "norms"), "--simulate: stands in the place of --calib"),
        (("--actcal-lora", "x"), "--actcal_lora: needs --simulate"),
        (("--simulate", "norms", "--actcal-lora", "absent"), "absent"),
        (("--simulate", "norms", "--calib-samples", "0"), "--calib_samples: must be from 1 to 1000000000"),
    ],
)
def test_combinations_without_meaning_are_refused(tmp_path: Path, flags: tuple[str, ...], word: str) -> None:
    result, output = converted(tmp_path, "--simple", *flags)
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("notice")]
    assert result.exit_code == 2 and line.startswith("error: ") and word in line
    assert not output.exists()


def test_without_norms_there_is_one_line(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"blocks.0.fc.weight": normal(32, 64)})
    result = run("convert", "-i", source, "-o", tmp_path / "out", "--simulate", "norms")
    assert result.exit_code == 2 and "no layer" in result.stderr and "stands behind a norm" in result.stderr


def test_a_norm_that_is_not_finite_is_named(tmp_path: Path) -> None:
    broken = dict(LLAMA)
    broken["model.layers.0.input_layernorm.weight"] = torch.full((32,), torch.inf)
    source = save(tmp_path / "in.safetensors", broken)
    result = run("calibrate", "--simulate", source, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 2 and "input_layernorm is not finite" in result.stderr
    assert not (tmp_path / "s.safetensors").exists()


def test_the_whole_of_a_lora_counts(tmp_path: Path) -> None:
    source, file = save(tmp_path / "in.safetensors", LLAMA), tmp_path / "lora.safetensors"
    digests = set()
    with Reader(source) as reader:
        for seed in (1, 2):
            save(file, {"model.layers.0.mlp.down_proj.lora_A.weight": normal(4, 48, seed=seed)})
            digests.add(SimulatedInputs(reader, "norms", lora=str(file)).digest())
    assert len(digests) == 2


def test_a_whole_name_is_the_layer_and_an_end_only_where_it_is_one() -> None:
    layers = ["blocks.0.attn.qkv", "double.blocks.0.attn.qkv", "a.b_c", "a_b.c", "y_blocks.0.q", "te1.fc", "te2.fc"]
    named = {name: f"{name}.lora_A.weight" for name in ("blocks.0.attn.qkv", "a.b_c", "blocks.0.q", "fc")}
    assert layers_of_lora(named.values(), layers) == {name: named[name] for name in ("blocks.0.attn.qkv", "a.b_c")}
    assert layers_of_lora(["te2.fc.lora_A.mine.weight"], layers) == {"te2.fc": "te2.fc.lora_A.mine.weight"}
    assert layers_of_lora(["lora_unet_a_b_c.lora_down.weight"], layers) == {}


@pytest.mark.parametrize(
    "a,word",
    [
        (torch.zeros(4, 48).to(torch.float8_e4m3fn), "A must be a float tensor, is F8_E4M3"),
        (torch.zeros(()), "no LoRA"),
    ],
)
def test_an_a_that_is_none_is_one_line(tmp_path: Path, a: torch.Tensor, word: str) -> None:
    file = save(tmp_path / "lora.safetensors", {"model.layers.0.mlp.down_proj.lora_A.weight": a})
    result, output = converted(tmp_path, "--simulate", "norms", "--actcal-lora", file)
    assert result.exit_code == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1
    assert not output.exists() and not output.with_name(f"{output.name}.partial").exists()


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_the_size_of_an_a_does_not_matter(size: float) -> None:
    a = normal(4, 32, seed=3).double()
    one, other = with_directions(standard_normal(32), a), with_directions(standard_normal(32), a * size)
    torch.testing.assert_close(one.second, other.second)


def test_layers_without_weights_and_long_numbers_do_no_harm(tmp_path: Path) -> None:
    odd = {
        "model.layers.1.mlp.down_proj.weight": torch.zeros(4, 0),
        f"layers.{'1' * 5000}.layer_norm1.weight": normal(4),
    }
    source = save(tmp_path / "in.safetensors", LLAMA | odd)
    for kind in ("norms", "gaussian"):
        result = run("calibrate", "--simulate", source, "--inputs", kind, "-o", tmp_path / "s.safetensors")
        assert result.exit_code == 0, result.output


def test_a_lora_without_rows_is_one_line(tmp_path: Path) -> None:
    source = save(tmp_path / "in", {"a.weight": normal(64, 64)})
    lora = save(tmp_path / "lora", {"a.lora_A.weight": torch.zeros(0, 64), "a.lora_B.weight": torch.zeros(64, 0)})
    flags = ("--simple", "--nvfp4", "--simulate", "gaussian", "--actcal_lora", lora)
    result = run("convert", "-i", source, "-o", tmp_path / "o", *flags)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "A must be [r,64], is [0, 64]" in line
