"""Experts that one module runs together: their inputs are those of layers that stand by themselves."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import hf_models
import lrq
from checkpoints import normal, run
from lrq.calibration import InputStats, collect, load_stats, merge
from lrq.calibration.experts import FEWEST, bounded, find_experts
from lrq.calibration.naming import PrefixRule, match_experts

HIDDEN, INNER, EXPERTS = 32, 16, 4
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    moe_intermediate_size=INNER,
    moe_latent_size=None,
    num_experts=EXPERTS,
    num_local_experts=EXPERTS,
    n_routed_experts=EXPERTS,
    moe_num_experts=EXPERTS,
    hidden_act="silu",
    mlp_hidden_act="relu2",
    swiglu_limit=0.5,
    swiglu_alpha=1.7,
    _experts_implementation="eager",
)
"""What the classes below ask of a config."""
CLASSES = [AriaExperts, DeepseekV4Experts, GptOssExperts, MixtralExperts, NemotronHExperts]
"""Transposed; with a clamp; interleaved, with biases; plain; without a gate."""


class Model(nn.Module):
    """One module of experts, tokens to two of them each; to expert 2 none."""

    def __init__(self, kind: type[nn.Module] = MixtralExperts) -> None:
        super().__init__()
        self.experts = kind(CONFIG)
        for seed, parameter in enumerate(self.experts.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed) / 4
        self.index = torch.tensor([[0, 1], [3, 0], [1, 3], [0, 3], [3, 1], [1, 0]])
        self.shares = torch.rand(6, 2, generator=torch.Generator().manual_seed(9))

    def forward(self, x: Tensor) -> Any:
        return self.experts(x.reshape(-1, HIDDEN), self.index, self.shares)


class Apart(nn.Module):
    """Experts of linear layers, as they stand in a checkpoint: ``spelling`` of gate, up and down."""

    def __init__(self, weights: dict[str, Tensor], place: str, spelling: tuple[str, str, str]) -> None:
        super().__init__()
        self.spelling = spelling
        for expert in range(EXPERTS):
            one = nn.Module()
            for name in spelling:
                weight = weights[f"{place}.{expert}.{name}.weight"]
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                layer.weight = nn.Parameter(weight)
                one.add_module(name, layer)
            self.add_module(str(expert), one)

    def forward(self, x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for token, slot in torch.cartesian_prod(torch.arange(len(x)), torch.arange(index.shape[1])).tolist():
            gate, up, down = (self.get_submodule(f"{index[token, slot]}.{name}") for name in self.spelling)
            y[token] += shares[token, slot] * down(silu(gate(x[token])) * up(x[token]))
        return y


def same(one: InputStats, other: InputStats) -> None:
    assert one.count == other.count and one.gram is not None and other.gram is not None
    for a, b in ((one.mean, other.mean), (one.second, other.second), (one.gram, other.gram)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert one.amax == pytest.approx(other.amax, rel=1e-4)


def calibrated(folder: Path) -> tuple[lrq.calibration.StatsFile, str]:
    path = folder.with_name("stats.safetensors")
    result = run("calibrate", "--hf", folder, "--texts", folder.with_name("texts.txt"), "-o", path)
    assert result.exit_code == 0, result.output
    return load_stats(path), result.output


PLAIN = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    "name,there,place,spelling",
    [
        ("qwen3_moe", "mlp.experts", "mlp.experts", PLAIN),
        ("qwen2_moe", "mlp.experts", "mlp.experts", PLAIN),
        ("deepseek_v3", "mlp.experts", "mlp.experts", PLAIN),
        ("mixtral", "mlp.experts", "block_sparse_moe.experts", ("w1", "w3", "w2")),
    ],
)
def test_statistics_are_those_of_layers_that_stand_alone(tmp_path: Path, name, there, place, spelling) -> None:
    """The texts run one by one there, so that nothing is padded; here together."""
    folder = hf_models.make(tmp_path / "model", name)
    found, said = calibrated(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    block = f"model.layers.0.{place}"
    model.set_submodule(f"model.layers.0.{there}", Apart(hf_models.weights(folder), block, spelling))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with collect(model) as inputs, torch.inference_mode():
        for text in hf_models.TEXTS.splitlines():
            model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    alone = {layer.replace(f"layers.0.{there}", f"layers.0.{place}"): one for layer, one in inputs.stats().items()}
    assert sum(block in layer for layer in alone) > 6 and set(found) == set(alone)
    for layer, one in alone.items():
        same(found[layer], one)
    unreached = {f"{block}.{e}.{part}" for e in range(EXPERTS) for part in spelling} - set(alone)
    assert all(layer in said for layer in unreached) == ("saw no input" in said or not unreached)
    assert "no statistics" not in said and "not collected" not in said


def test_every_expert_is_converted_by_its_statistics(tmp_path: Path) -> None:
    folder = hf_models.make(tmp_path / "model", "qwen3_moe")
    found, _ = calibrated(folder)
    flags = ("--nvfp4", "--calib", found.path, "--verbose")
    result = run("convert", "-i", folder, "-o", tmp_path / "out.safetensors", *flags)
    assert result.exit_code == 0 and "none of" not in result.output, result.output
    for expert in range(EXPERTS):
        for part in PLAIN:
            layer = f"model.layers.0.mlp.experts.{expert}.{part}"
            (row,) = (line for line in result.output.splitlines() if layer in line and "tokens" in line)
            assert f"{found[layer].count} tokens" in row


def test_a_checkpoint_of_experts_in_one_tensor(tmp_path: Path) -> None:
    """They are stored transposed, and no loader would find their scales: they stay as they are."""
    folder = hf_models.make(tmp_path / "model", "gpt_oss")
    found, said = calibrated(folder)
    place = "model.layers.0.mlp.experts"
    assert {layer for layer in found if place in layer} == {f"{place}.gate_up_proj", f"{place}.down_proj"}
    assert found[f"{place}.gate_up_proj"].count == 2 * hf_models.TOKENS and len(said.splitlines()) == 1
    result = run("convert", "-i", folder, "-o", tmp_path / "out.safetensors", "--nvfp4", "--calib", found.path)
    assert result.exit_code == 0 and "the weight is stored transposed" in result.output, result.output


@pytest.mark.parametrize("kind", CLASSES)
def test_what_reaches_the_second_layer_gives_the_output(kind: type[nn.Module]) -> None:
    """The outputs of a module are those of the second layer for the inputs that were found."""
    model, x = Model(kind), normal(6, HIDDEN, seed=1)
    (experts,) = find_experts(model)[0].values()
    y = torch.zeros(6, HIDDEN)
    module: Any = model.experts
    with torch.no_grad():
        routed = experts.routed((x, model.index, model.shares), {}, None)
        assert routed is not None
        ((every, counts),) = routed.groups()
        for expert, rows in enumerate(every.split(counts)):
            tokens, slots = (model.index == expert).nonzero(as_tuple=True)
            assert torch.equal(rows, x[tokens])
            weight = module.down_proj[expert]
            z = experts.inputs_of_second(expert, rows) @ (weight if experts.transposed else weight.T)
            bias = module.down_proj_bias[expert] if hasattr(module, "down_proj_bias") else 0
            y.index_add_(0, tokens, (z + bias) * model.shares[tokens, slots, None])
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_expert_that_no_token_reached_has_no_statistics(kind: type[nn.Module]) -> None:
    model, x = Model(kind), normal(6, HIDDEN)
    with collect(model) as inputs, torch.inference_mode():
        model(x)
    parts = PLAIN[kind is NemotronHExperts :]
    assert set(inputs.seen) == set(inputs.stats()) == {f"experts.{e}.{part}" for e in (0, 1, 3) for part in parts}
    assert inputs.unseen == [f"experts.2.{part}" for part in parts]
    stats = inputs.stats()
    one = stats["experts.3.up_proj"]
    tokens = x[(model.index == 3).any(1)].double()
    assert one.count == len(tokens)
    torch.testing.assert_close(one.mean, tokens.mean(0))
    assert stats[f"experts.3.{parts[0]}"] is one


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_padding_goes_to_no_expert(device: str) -> None:
    model, x = Model(), normal(2, 3, HIDDEN).to(device)
    model.experts.to(device)
    model.index, model.shares = model.index.to(device), model.shares.to(device)
    with collect(model) as inputs:
        inputs.mask = torch.tensor([[True, True, False], [True, False, False]])
        model(x)
    # Tokens 0, 1 and 3 go to experts 0 and 1, 3 and 0, 0 and 3.
    counts = {name: one.count for name, one in inputs.stats().items()}
    assert counts == {f"experts.{e}.{part}": n for e, n in ((0, 3), (1, 1), (3, 2)) for part in PLAIN}
    torch.testing.assert_close(inputs.stats()["experts.1.up_proj"].mean, x[0, 0].double().cpu())


def test_arguments_may_have_names_and_numbers_of_others() -> None:
    model, x = Model(), normal(6, HIDDEN)
    with collect(model) as inputs:
        model.experts(
            top_k_weights=model.shares, hidden_states=x, top_k_index=model.index.masked_fill(model.index == 0, 4)
        )
    assert {name.split(".")[1] for name in inputs.seen} == {"1", "3"}


def test_experts_are_chosen() -> None:
    model = Model()
    with collect(model, r"experts\.1\.down") as inputs:
        model(normal(6, HIDDEN))
    assert inputs.seen == ["experts.1.down_proj"]


@pytest.mark.parametrize("kind", [MixtralExperts, GptOssExperts])
def test_experts_in_one_tensor_count_together(tmp_path: Path, kind: type[nn.Module]) -> None:
    model, x = Model(kind), normal(6, HIDDEN)
    keys = ["m.experts.gate_up_proj", "m.experts.down_proj"]
    with collect(model, keys=keys) as together, collect(model) as apart:
        model(x)
    assert together.seen == keys and together.stats()[keys[0]].count == 12
    for key, part in zip(keys, ("up_proj", "down_proj"), strict=True):
        one, two, three = (apart.stats()[f"experts.{e}.{part}"] for e in (0, 1, 3))
        same(together.stats()[key], merge(merge(one, two), three))
    together.save(tmp_path / "stats.safetensors")
    transposed = load_stats(tmp_path / "stats.safetensors").transposed
    assert set(transposed) == (set(keys) if kind is GptOssExperts else set())


def _spread(model: Model) -> None:
    model.experts._is_expert_parallel = True


def _eight_bits(model: Model) -> None:
    model.experts.gate_up_proj.data = model.experts.gate_up_proj.data.to(torch.float8_e4m3fn)


def _odd(model: Model) -> None:
    model.experts.down_proj.data = normal(EXPERTS, HIDDEN, INNER + 1)


def _other(model: Model) -> None:
    model.experts = Llama4TextExperts(CONFIG)


@pytest.mark.parametrize(
    "change,why",
    [(_spread, "over processes"), (_eight_bits, "float8_e4m3fn"), (_odd, "do not fit"), (_other, "a way of their own")],
)
def test_what_is_not_understood_is_not_collected(change, why: str) -> None:
    model = Model()
    change(model)
    model.fc = nn.Linear(8, 8)
    inputs = collect(model)
    assert why in inputs.refused["experts"] and inputs.unseen == ["fc"]


def test_experts_of_unknown_names_are_not_collected(tmp_path: Path) -> None:
    model = Model()
    model.fc = nn.Linear(8, 8)
    inputs = collect(model, keys=["fc.weight", *(f"experts.{e}.dense.weight" for e in range(EXPERTS))])
    assert "under a name that is known" in inputs.refused["experts"] and inputs.unseen == ["fc"]
    with pytest.raises(lrq.InputError, match="a single layer"):
        collect(model.experts)


def test_offloaded_experts_have_statistics_of_their_first_layer() -> None:
    model, x = Model(), normal(6, HIDDEN)
    shares, index = model.shares, model.index
    model.experts.to("meta").forward = lambda *args: None
    with collect(model) as inputs:
        model.experts(x, index, shares)
    assert "offloaded" in inputs.refused["experts"]
    assert set(inputs.seen) == {f"experts.{e}.{part}" for e in (0, 1, 3) for part in PLAIN[:2]}


def _keys(place: str, count: int, parts: tuple[str, ...] = PLAIN) -> list[str]:
    return [f"{place}.{e}.{part}" for e in range(count) for part in parts]


@pytest.mark.parametrize(
    "keys,found",
    [
        (_keys("m.layers.7.moe.experts", 2, ("w1", "w3", "w2")), "m.layers.7.moe.experts.1.w2"),
        (
            _keys("m.layers.7.mlp.experts", 2) + _keys("m.layers.7.other.experts", 2),
            "m.layers.7.mlp.experts.1.down_proj",
        ),
        (_keys("m.layers.7.a.experts", 2) + _keys("m.layers.7.b.experts", 2), None),
        (_keys("m.layers.7.moe.experts", 3), None),
        (_keys("m.layers.8.moe.experts", 2), None),
        (_keys("m.layers.7.moe.experts", 2, ("up_proj", "down_proj")), None),
        (["m.layers.7.mlp.experts.gate_up_proj", "m.layers.7.mlp.experts.down_proj"], None),
        (["m.layers.7.shared_experts.gate_up_proj", "m.layers.7.shared_experts.down_proj"], None),
    ],
)
def test_names_of_experts_become_keys(keys: list[str], found: str | None) -> None:
    matched = match_experts({"layers.7.mlp.experts": (2, True)}, keys, PrefixRule("", "m."))
    assert matched["layers.7.mlp.experts"].get("1.down_proj") == found


def test_experts_without_a_gate_are_no_shared_experts() -> None:
    parts = ("up_proj", "down_proj")
    keys = [
        *_keys("backbone.layers.1.mixer.experts", 2, parts),
        *(f"backbone.layers.1.mixer.shared.{p}" for p in parts),
    ]
    found = match_experts({"model.layers.1.mixer.experts": (2, False)}, keys, PrefixRule())
    assert set(found["model.layers.1.mixer.experts"].values()) == set(keys[:4])


def test_of_two_modules_with_the_same_numbers_none_is_guessed() -> None:
    keys, rule = _keys("layers.7.experts", 2), PrefixRule()
    assert match_experts({"layers.7.text": (2, True)}, keys, rule)["layers.7.text"]
    assert not any(match_experts({"layers.7.text": (2, True), "layers.7.image": (2, True)}, keys, rule).values())


def test_second_moments_of_many_experts_are_bounded() -> None:
    options = {"gram_limit": 4096, "rank": 512}
    assert bounded(options, [64] * 100) == options
    assert bounded(options, [2048] * 6144) == {"gram_limit": 0, "rank": 0}
    some = bounded(options, [4096] * 256 + [14336] * 256)
    assert some["gram_limit"] == 0 and FEWEST <= some["rank"] < 512
    assert bounded({"gram_limit": 0, "rank": 0}, [2048] * 6144) == {"gram_limit": 0, "rank": 0}


def test_what_is_kept_of_many_experts_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = import_module("lrq.calibration.collect")
    monkeypatch.setattr(collector, "bounded", lambda options, widths: bounded(options, widths, 1000))
    found, said = calibrated(hf_models.make(tmp_path / "model", "qwen3_moe"))
    assert "second moments of experts, which are many, the diagonals alone are kept" in said
    assert found["model.layers.0.mlp.experts.0.up_proj"].gram is None and found["lm_head"].gram is not None
