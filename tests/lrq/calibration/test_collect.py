"""Hooks on modules: who is a layer, what counts, and how names become keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lrq
import lrq.calibration
from checkpoints import normal
from lrq.calibration.naming import prefix_rule


class Conv1D(nn.Module):
    """As transformers writes it: y = xW, W [K,N]."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(columns, rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Bank(nn.Module):
    """Two experts, whose inputs come sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(2, 6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("etk,enk->etn", x, self.weight)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)
        self.twin = nn.Linear(8, 4)
        self.twin.weight = self.fc.weight
        self.turned = Conv1D(8, 4)
        self.experts = Bank()
        self.idle = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.fc(x) + self.twin(input=2 * x) + self.turned(3 * x) + self.experts(x.reshape(2, -1, 8)).sum()


def test_statistics_are_those_of_what_flowed_in() -> None:
    model, x = Model(), normal(4, 3, 8)
    with lrq.calibration.collect(model) as inputs, torch.inference_mode():
        model(x[:2].reshape(6, 8))
        model(x[2:].reshape(6, 8))
    stats = inputs.stats()
    assert stats.keys() == {"fc", "twin", "turned", "experts"} and inputs.unseen == ["idle"]
    seen = model.norm(x).detach().reshape(-1, 8).double()
    both = torch.cat((seen, 2 * seen))
    for name in ("fc", "twin"):
        assert stats[name].count == 24
        torch.testing.assert_close(stats[name].mean, both.mean(0))
        torch.testing.assert_close(stats[name].second, both.square().mean(0))
        assert stats[name].gram is not None
        torch.testing.assert_close(stats[name].gram, (both.T @ both / 24).float())
        assert stats[name].amax == both.abs().amax().float().item()
    torch.testing.assert_close(stats["turned"].mean, 3 * seen.mean(0))
    assert stats["experts"].count == 12 and inputs.tokens == 24


def test_nothing_is_seen_outside_and_more_when_entered_again() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), normal(5, 8)
    inputs = lrq.calibration.collect(model)
    model(x)
    with inputs:
        model(x)
    model(x)
    with inputs, torch.inference_mode():
        model(x)
    assert inputs.stats()["0"].count == 10


def test_padding_does_not_count() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), normal(2, 3, 8)
    with lrq.calibration.collect(model) as inputs:
        inputs.mask = torch.tensor([[True, True, False], [True, False, False]])
        model(x)
    kept = torch.cat((x[0, :2], x[1, :1])).double()
    assert inputs.stats()["0"].count == 3
    torch.testing.assert_close(inputs.stats()["0"].mean, kept.mean(0))


def test_layers_are_chosen(tmp_path: Path) -> None:
    model = Model()
    for choice in (r"^fc$", ["fc"], lambda name: name == "fc"):
        with lrq.calibration.collect(model, choice) as inputs:
            model(normal(4, 8))
        assert inputs.stats().keys() == {"fc"}
    for choice, word in (("(", "no regular expression"), ("absent", "no linear layer")):
        with pytest.raises(lrq.InputError, match=word):
            lrq.calibration.collect(model, choice)
    with pytest.raises(lrq.InputError, match="no layer saw an input"):
        lrq.calibration.collect(model).save(tmp_path / "stats.safetensors")
    assert not list(tmp_path.iterdir())


def test_names_become_keys_of_the_checkpoint(tmp_path: Path) -> None:
    model = Model()
    keys = [f"model.diffusion_model.{name}.weight" for name in ("fc", "turned", "norm")]
    with lrq.calibration.collect(model, keys=keys) as inputs:
        model(normal(4, 8))
    assert str(inputs.rule) == "with model.diffusion_model."
    assert inputs.unmatched == ["twin", "experts", "idle"]
    inputs.save(tmp_path / "stats.safetensors")
    stats = lrq.calibration.load_stats(tmp_path / "stats.safetensors")
    assert set(stats) == {"model.diffusion_model.fc", "model.diffusion_model.turned"} and stats.measured
    assert stats.transposed == ("model.diffusion_model.turned",)


@pytest.mark.parametrize(
    "names,keys,rule",
    [
        (["a.b", "c"], ["a.b", "d"], ("", "")),
        (["a.b", "a.c"], ["m.a.b", "m.a.c", "m.x.a.b"], ("", "m.")),
        (["m.n.b", "m.n.c"], ["b", "c"], ("m.n.", "")),
        (["a"], ["b"], ("", "")),
    ],
)
def test_the_prefix_is_that_under_which_most_match(names, keys, rule) -> None:
    found = prefix_rule(names, keys)
    assert (found.strip, found.add) == rule


def test_an_input_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with lrq.calibration.collect(model) as inputs:
        model(torch.full((1, 8), float("inf")))
    with pytest.raises(lrq.InputError, match="layer 0: an input is NaN or infinite"):
        inputs.stats()


def test_a_mask_must_be_of_truth_values() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with lrq.calibration.collect(model) as inputs:
        for mask in (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5), [[True]]):
            with pytest.raises(lrq.InputError, match=r"mask: must be a bool tensor .* take mask\.bool"):
                inputs.mask = mask


def test_layers_that_a_mask_does_not_fit_are_told() -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).transpose(0, 1))

    model = Flipped()
    with lrq.calibration.collect(model) as inputs:
        inputs.mask = torch.tensor([[True, True, False], [True, False, False]])
        model(normal(2, 3, 8))
    assert inputs.unmasked == ["second"] and [one.count for one in inputs.stats().values()] == [3, 6]


def test_a_layer_of_two_names_has_statistics_under_both() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(8, 8)
    for keys in (None, ["b.weight"], ["a.weight", "b.weight"]):
        with lrq.calibration.collect(model, keys=keys) as inputs:
            model.a(normal(5, 8))
        found = inputs.stats()
        assert found.keys() == ({"a", "b"} if keys is None else {key[0] for key in keys})
        assert all(one.count == 5 for one in found.values())


def test_computed_weights_are_not_taken_for_one() -> None:
    norm = torch.nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(8, 8)), norm(nn.Linear(8, 16)), norm(nn.Linear(16, 8)))
    with lrq.calibration.collect(model) as inputs:
        model(normal(5, 8))
    assert [one.count for one in inputs.stats().values()] == [5, 5, 5]
