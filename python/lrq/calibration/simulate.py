"""Statistics of inputs from the checkpoint alone: what a norm with gain g and bias b gives to the layers behind it.

A norm's output is g·z + b, and z has mean 0 and variance 1 over the features of a token; taken as the same for each
feature over the tokens, the mean is b and the second moment g² + b². That is a guess: it shapes a metric or an input
scale, never a bias (``origin`` is ``simulated``). All is computed in closed form: there is no sample, and no noise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from lrq.calibration.inputs import BINS, InputStats, bin_edge

T = TypeVar("T")

FEEDS: tuple[tuple[str, str], ...] = (
    # BERT normalises behind a sublayer: the norm of a block feeds the next one.
    (r"embeddings\.LayerNorm$", r"encoder.layer.0.attention.self.{query,key,value}"),
    (r"encoder\.layer\.(\d{1,9})\.attention\.output\.LayerNorm$", r"encoder.layer.{0}.intermediate.dense"),
    (r"encoder\.layer\.(\d{1,9})\.output\.LayerNorm$", r"encoder.layer.{0+1}.attention.self.{query,key,value}"),
    # Llama, Mistral, Qwen.
    (r"layers\.(\d{1,9})\.input_layernorm$", r"layers.{0}.self_attn.{q_proj,k_proj,v_proj,qkv_proj}"),
    (r"layers\.(\d{1,9})\.post_attention_layernorm$", r"layers.{0}.mlp.{gate_proj,up_proj,gate_up_proj}"),
    # CLIP.
    (r"layers\.(\d{1,9})\.layer_norm1$", r"layers.{0}.self_attn.{q_proj,k_proj,v_proj}"),
    (r"layers\.(\d{1,9})\.layer_norm2$", r"layers.{0}.mlp.fc1"),
    # T5, UMT5.
    (r"block\.(\d{1,9})\.layer\.0\.layer_norm$", r"block.{0}.layer.0.SelfAttention.{q,k,v}"),
    (r"block\.(\d{1,9})\.layer\.1\.layer_norm$", r"block.{0}.layer.1.DenseReluDense.{wi,wi_0,wi_1}"),
    # Transformers of images.
    (r"blocks\.(\d{1,9})\.norm1$", r"blocks.{0}.attn.{qkv,q,k,v,to_q,to_k,to_v}"),
    (r"blocks\.(\d{1,9})\.norm2$", r"blocks.{0}.mlp.{fc1,fc_in}"),
)
"""The end of a norm's name, and the layers that it feeds: {0} is the block's number, {0+1} the next, {a,b} either."""
FRONTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # BERT.
    (r"encoder\.layer\.(\d{1,9})\.output\.dense$", ("encoder.layer.{0}.intermediate.dense",)),
    # Llama, Mistral, Qwen.
    (r"layers\.(\d{1,9})\.mlp\.down_proj$", ("layers.{0}.mlp.gate_proj", "layers.{0}.mlp.up_proj")),
    # CLIP.
    (r"layers\.(\d{1,9})\.mlp\.fc2$", ("layers.{0}.mlp.fc1",)),
    # T5, UMT5.
    (
        r"block\.(\d{1,9})\.layer\.1\.DenseReluDense\.wo$",
        ("block.{0}.layer.1.DenseReluDense.wi_0", "block.{0}.layer.1.DenseReluDense.wi_1"),
    ),
    # Transformers of images.
    (r"blocks\.(\d{1,9})\.mlp\.fc2$", ("blocks.{0}.mlp.fc1",)),
)
"""The end of a layer's name, and the layer whose activation it reads, or of two the one that opens the other."""
UNLIKE = ("pre_feedforward_layernorm", "k_norm_scale_shift")
"""Parts of names whose models use these names in another way: Gemma's gains count from 1, and its norms stand apart."""
TOKENS = 64
"""What a simulated layer counts as: little, beside measured ones."""


def deviations(tokens: int, columns: int) -> float:
    """The largest of that many tokens' normal numbers: as many as that are expected to exceed it is one half."""
    return -torch.special.ndtri(torch.tensor(0.25 / (tokens * columns), dtype=torch.float64)).item()


def feeds(keys: Collection[str]) -> dict[str, str]:
    """The norm that feeds it, by layer with a ``.weight`` among ``keys``; empty for models with other uses of names."""
    found: dict[str, str] = {}
    for norm, start, match, template in _known(keys, FEEDS):
        number = int(match[1]) if match.groups() else 0
        for layer in _layers(template.replace("{0}", str(number)).replace("{0+1}", str(number + 1))):
            if f"{start}{layer}.weight" in keys:
                found[start + layer] = norm
    return found


def fronts(keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The layers whose activation it reads, by layer, where all of them have a ``.weight`` among ``keys``."""
    found: dict[str, tuple[str, ...]] = {}
    for layer, start, match, templates in _known(keys, FRONTS):
        before = tuple(start + one.replace("{0}", match[1]) for one in templates)
        if all(f"{one}.weight" in keys for one in before):
            found[layer] = before
    return found


def _known(keys: Collection[str], table: Iterable[tuple[str, T]]) -> Iterator[tuple[str, str, re.Match[str], T]]:
    """Names with a ``.weight`` among ``keys`` that end as the table says: name, what is before, match and entry."""
    if any(part in key for key in keys for part in UNLIKE):
        return
    for key in sorted(keys):
        name = key.removesuffix(".weight")
        for pattern, entry in table if name != key else ():
            match = re.search(pattern, name)
            if match is not None and (match.start() == 0 or name[match.start() - 1] == "."):
                yield name, name[: match.start()], match, entry


def _layers(template: str) -> Iterator[str]:
    choice = re.search(r"\{([\w,]+)\}", template)
    if choice is None:
        yield template
        return
    for one in choice[1].split(","):
        yield template[: choice.start()] + one + template[choice.end() :]


def from_norm(gain: Tensor, bias: Tensor | None, tokens: int = TOKENS) -> InputStats:
    """Statistics of the outputs of a norm with ``gain`` [K] and ``bias`` [K], if it has one, over ``tokens``."""
    g = gain.double()
    b = torch.zeros_like(g) if bias is None else bias.double()
    edges = torch.tensor([bin_edge(i) for i in range(BINS - 1)], dtype=torch.float64)
    scale = g.abs().clamp(min=1e-30)
    upper = torch.special.ndtr((edges[:, None] - b) / scale)
    lower = torch.special.ndtr((-edges[:, None] - b) / scale)
    below = torch.cat(
        (torch.zeros(1, dtype=torch.float64), (upper - lower).mean(1), torch.ones(1, dtype=torch.float64))
    )
    counts = (below * tokens * len(g)).round().long().diff()
    amax = (b.abs() + deviations(tokens, len(g)) * g.abs()).amax().item()
    return InputStats(tokens, b, g.square() + b.square(), amax, counts)


def standard_normal(columns: int, tokens: int = TOKENS) -> InputStats:
    """Statistics of standard normal inputs [K]: what is said of a layer of which nothing is known."""
    return from_norm(torch.ones(columns), None, tokens)
