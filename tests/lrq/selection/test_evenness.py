"""What the singular values of a weight say of its error."""

from __future__ import annotations

import json

import pytest
import torch

from checkpoints import normal, run, save
from lrq.formats import FORMATS
from lrq.selection.evenness import evenness
from lrq.selection.heuristics import relative_error


def exact(*matrices: torch.Tensor) -> float:
    values = torch.stack([torch.linalg.svdvals(matrix.double()) for matrix in matrices]) ** 2
    return (values.sum() ** 2 / values.numel() / values.square().sum()).item()


@pytest.mark.parametrize("shape", [(64, 64), (300, 40), (40, 300), (1, 50), (1500, 1400)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_that_of_the_singular_values(shape, dtype):
    w = (normal(*shape, seed=1) * torch.linspace(0.1, 3, shape[1])).to(dtype)
    assert evenness(w) == pytest.approx(exact(w), rel=1e-4)
    assert evenness(w.T) == pytest.approx(evenness(w), rel=1e-5)


def test_its_bounds_are_one_direction_and_equal_ones():
    assert evenness(torch.linalg.qr(normal(64, 64))[0]) == pytest.approx(1, rel=1e-5)
    assert evenness(torch.outer(normal(1, 64)[0], normal(1, 80, seed=1)[0])) == pytest.approx(1 / 64, rel=1e-5)


def test_the_size_of_weights_does_not_count():
    w = normal(64, 96)
    for scale in (1e-30, 1e30):
        assert evenness(w * scale) == pytest.approx(evenness(w), rel=1e-4)
    assert evenness(torch.zeros(8, 8)) == 1


def test_a_bank_is_one_weight():
    bank = torch.stack([normal(32, 48), 3 * normal(32, 48, seed=1)])
    assert evenness(bank) == pytest.approx(exact(*bank), rel=1e-4)
    assert evenness(torch.stack([bank[0], bank[0]])) == pytest.approx(evenness(bank[0]), rel=1e-5)


def test_bits_go_where_no_direction_leads(tmp_path):
    """Of inputs that lie as its rows do, the outputs of the other are large beside its error, which is no smaller."""
    even = normal(128, 128)
    led = normal(128, 128, seed=10) + 2 * torch.outer(normal(1, 128, seed=20)[0], normal(1, 128, seed=30)[0])
    assert relative_error(FORMATS["nvfp4"], led) > relative_error(FORMATS["nvfp4"], even)
    source = save(tmp_path / "in", {"a.led.weight": led, "b.even.weight": even})
    said = json.loads(run("plan", source, "--target_bits", 6.25, "--json", "--preset", "none").stdout)
    formats = {name: spec["format"] for name, spec in said["layers"].items()}
    assert formats == {"a.led": "nvfp4", "b.even": "float8_e4m3fn"}
