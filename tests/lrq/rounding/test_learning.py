"""Learned rounding of tensors in memory: what the converter writes, in the order in which they came."""

from __future__ import annotations

import pytest
import torch

import lrq
from checkpoints import normal
from lrq.config import Rounding
from lrq.formats import FORMATS
from lrq.report.stored import same_bytes
from lrq.rounding.solve import quantize_layer


@pytest.mark.parametrize("name", FORMATS)
def test_each_is_what_it_is_alone(name):
    weights = [normal(64, 128, seed=1), normal(32, 128, seed=2).bfloat16(), normal(64, 128, seed=3)]
    weights.append(normal(2, 32, 128, seed=4))
    if FORMATS[name].refusal((32, 128)) is not None:
        weights = [normal(256, 256, seed=5)]
    found = lrq.quantize_layers(weights, name, num_iter=20)
    assert len(found) == len(weights)
    for w, tensors in zip(weights, found, strict=True):
        expected, _ = quantize_layer(FORMATS[name], w, Rounding(num_iter=20), 0)
        assert expected.keys() == tensors.keys()
        for suffix, tensor in expected.items():
            assert same_bytes(tensor, tensors[suffix]), suffix


def test_none_is_none():
    assert lrq.quantize_layers([]) == []


@pytest.mark.parametrize(
    "weights,format,settings,word",
    [
        ([torch.ones(8, 8)], "nvfp", {}, "no such format; did you mean nvfp4"),
        ([torch.ones(8, 8), torch.full((8, 8), torch.nan)], "nvfp4", {}, "weight 1: holds NaN or Inf"),
        ([torch.ones(0, 8)], "nvfp4", {}, "weight 0: must be .*with a weight"),
        ([torch.ones(8, 8).int()], "nvfp4", {}, "weight 0: must be a dense tensor of .*is torch.int32"),
        ([[1.0]], "nvfp4", {}, "weight 0: must be a dense tensor of .*is list"),
        ([torch.ones(8)], "nvfp4", {}, "weight 0: must be .*is \\[8\\]"),
        ([torch.ones(8, 8)], "nvfp4", {"topp": 0.2}, "topp: no such setting; did you mean top_p"),
        ([torch.ones(8, 8)], "nvfp4", {"top_p": 2.0}, "--top_p: must be from 0.0 to 1.0"),
        ([torch.ones(256, 256), torch.ones(8, 10)], "fp8-block", {}, "weight 1: fp8-block: "),
    ],
)
def test_bad_input_is_one_line(weights, format, settings, word):
    with pytest.raises(lrq.InputError, match=word):
        lrq.quantize_layers(weights, format, **settings)
