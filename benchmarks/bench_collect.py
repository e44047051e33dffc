"""What watching costs: the forward pass of blocks of real sizes with lrq.calibration.collect and without.

    python benchmarks/bench_collect.py [--json benchmarks/results/collect-h200.json]

Weights are random, shapes those of the models: decoder layers of Llama 3 8B (the second moments of 4096 inputs kept
whole, 512 eigenpairs of 14336), a block of FLUX.1 (3072 and 12288) and a layer of Qwen3-30B-A3B (128 experts in one
module). A forward pass is of 4096 tokens in bfloat16; on the CPU of 64, in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from lrq.calibration import collect
from measure import machine

REPEATS = 7


class Attention(nn.Module):
    """Of grouped queries."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """The feed-forward part of Llama."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    """The feed-forward part of FLUX.1."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x), approximate="tanh"))


class Experts(nn.Module):
    """As transformers 5 holds them: the parameters of all in three dimensions."""

    has_gate = True

    def __init__(self, count: int, width: int, inner: int) -> None:
        super().__init__()
        self.count = count
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return silu(gate) * up

    def forward(self, x: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.count):
            rows, place = (numbers == expert).nonzero(as_tuple=True)
            inner = self._apply_gate(x[rows] @ self.gate_up_proj[expert].mT)
            out.index_add_(0, rows, inner @ self.down_proj[expert].mT * weights[rows, place, None])
        return out


class Routed(nn.Module):
    """Eight experts a token."""

    def __init__(self, width: int, inner: int, count: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(width, count, bias=False), Experts(count, width, inner)

    def forward(self, x: Tensor) -> Tensor:
        weights, numbers = self.gate(x).softmax(-1).topk(8)
        return self.experts(x.flatten(0, 1), numbers.flatten(0, 1), weights.flatten(0, 1)).view_as(x)


class Block(nn.Module):
    """Attention and what follows it."""

    def __init__(self, width: int, attention: nn.Module, forward: nn.Module) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention, self.mlp = attention, forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


MODELS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "Llama 3 8B, 4 layers": (
        4096,
        lambda: nn.Sequential(*(Block(4096, Attention(4096, 32, 8), Gated(4096, 14336)) for _ in range(4))),
    ),
    "FLUX.1, 4 blocks": (
        3072,
        lambda: nn.Sequential(*(Block(3072, Attention(3072, 24, 24), Plain(3072, 12288)) for _ in range(4))),
    ),
    "Qwen3-30B-A3B, 1 layer": (2048, lambda: Block(2048, Attention(2048, 16, 4), Routed(2048, 768, 128))),
}
"""Width and how they are made."""


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a run after two that warm up."""
    found = []
    for _ in range(REPEATS + 2):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench(device: torch.device, models: list[str]) -> list[dict[str, object]]:
    """Seconds of a forward pass of every model, unwatched and watched, and the ratio."""
    dtype, tokens = (torch.bfloat16, 2048) if device.type == "cuda" else (torch.float32, 32)
    rows: list[dict[str, object]] = []
    for name in models:
        width, make = MODELS[name]
        with torch.device(device):
            model = make().to(dtype)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.02)
            x = torch.randn(2, tokens, width, dtype=dtype)
        with torch.no_grad():
            plain = timed(lambda m=model, x=x: m(x), device)
            with collect(model):
                watched = timed(lambda m=model, x=x: m(x), device)
        rows.append({"model": name, "tokens": x[..., 0].numel(), "seconds": plain, "watched": watched})
        print(
            f"{name:26} {plain * 1e3:8.2f} ms, watched {watched * 1e3:8.2f} ms, {watched / plain:.2f} times", flush=True
        )
        del model
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = bench(device, options.models)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(device), "results": results}, indent=1) + "\n")
