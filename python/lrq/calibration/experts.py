"""Experts that one module runs together, as transformers 5 does: who they are, and what flows into their layers.

Such a module holds the weights of all its experts as 3-D parameters and is called with the tokens [T,H] and the
numbers [T,k] of the experts that each token goes to. Expert e computes ``down_proj[e] · gate(gate_up_proj[e] · x)``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lrq.calibration.accumulator import CHUNK, OVERSAMPLING
from lrq.calibration.naming import DOWN, GATE, GATE_UP, UP, expert_layers, fused_layers

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SUMS_LIMIT = 8 << 30
"""Bytes that the second moments of all experts may take while they are summed."""
GROUP = CHUNK
"""Elements that are gathered at once, more only where they go to one expert."""
FEWEST = 32
"""Eigenpairs; fewer are not kept."""


@dataclass(frozen=True, eq=False)
class Routed:
    """Rows [T,H] of a call, and the number of a row for every place of an expert, one expert's after the other's."""

    rows: Tensor
    order: Tensor
    counts: list[int]
    """How many rows go to each expert."""

    def groups(self) -> Iterator[tuple[Tensor, list[int]]]:
        """The rows [n,H] in their places, and how many of them go to each expert: some of the experts at a time."""
        most, begin, size = max(1, GROUP // self.rows.shape[1]), 0, 0
        counts = [0] * len(self.counts)
        for expert, count in enumerate(self.counts):
            if size and size + count > most:
                yield self.rows[self.order[begin : begin + size]], counts
                begin, size, counts = begin + size, 0, [0] * len(self.counts)
            counts[expert], size = count, size + count
        if size:
            yield self.rows[self.order[begin : begin + size]], counts


@dataclass(frozen=True, eq=False)
class Experts:
    """A module of experts, and the shapes of its parameters.

    ``gate_up_proj`` is [E,2I,H] (without a gate ``up_proj`` [E,I,H]) and ``down_proj`` [E,H,I]; transposed, they are
    [E,H,2I] and [E,I,H]. ``gate_up_proj_bias`` [E,2I] may be there.
    """

    module: nn.Module
    count: int
    """E."""
    columns: int
    """H, inputs of the first layer."""
    inner: int
    """I, inputs of the second."""
    gated: bool
    transposed: bool

    @property
    def layers(self) -> list[str]:
        """Names of the experts' layers, each by itself."""
        return expert_layers(self.count, self.gated)

    @property
    def fused_layers(self) -> list[str]:
        """Names of the layers of all experts together, which are those of the parameters."""
        return fused_layers(self.gated)

    def routed(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> Routed | None:
        """The rows that go to experts in one call.

        Args:
            args, kwargs: of the call.
            mask: bool, the tokens that count, in the order of the call's; one of another size is not used.
        """
        x = args[0] if args else kwargs.get("hidden_states")
        numbers = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, Tensor) and _is_integer(one)]
        if not isinstance(x, Tensor) or not x.numel() or x.shape[-1] != self.columns or not numbers:
            return None
        rows, chosen = x.detach().reshape(-1, self.columns), numbers[0]
        if chosen.dim() < 2 or chosen.shape[:-1].numel() != len(rows):
            return None
        chosen = chosen.reshape(len(rows), -1)
        # Numbers beyond the last stand for no expert of this module.
        absent = (chosen < 0) | (chosen >= self.count)
        if mask is not None and mask.numel() == len(rows):
            absent = absent | ~mask.to(chosen.device).reshape(-1, 1)
        numbered = chosen.masked_fill(absent, self.count).flatten()
        order = numbered.argsort(stable=True) // chosen.shape[1]
        # One wait for the device for all experts.
        counts = torch.bincount(numbered, minlength=self.count + 1).tolist()[: self.count]
        return Routed(rows, order, counts)

    def inputs_of_second(self, expert: int, x: Tensor) -> Tensor | None:
        """What flows into ``down_proj`` [t,I] for rows [t,H]; None while the weights are elsewhere (offloaded)."""
        first = GATE_UP if self.gated else UP
        weights, biases = getattr(self.module, first), getattr(self.module, f"{first}_bias", None)
        if weights.is_meta:
            return None
        weight = weights[expert].T if self.transposed else weights[expert]
        bias = biases[expert] if isinstance(biases, Tensor) else None
        y = linear(x.to(weight.dtype), weight, bias)
        module: Any = self.module
        result: Tensor = module._apply_gate(y) if self.gated else module.act_fn(y)
        return result


@dataclass(frozen=True, eq=False)
class Route:
    """Layers of a module of experts, and whose sums the inputs of each are added to."""

    module: str
    experts: Experts
    owners: Mapping[str, str]
    """By name of a layer; gate and up of an expert, whose inputs are the same, have one."""
    first: Mapping[int, str]
    second: Mapping[int, str]
    """Owners by expert, of the inputs of the first and of the second layer."""

    @classmethod
    def of(cls, module: str, experts: Experts, layers: Collection[str]) -> Route:
        """For some of the layers of a module, or some of its fused ones."""
        owners: dict[str, str] = {}
        first: dict[int, str] = {}
        second: dict[int, str] = {}
        for layer in layers:
            number, _, role = layer.rpartition(".")
            owner = f"{module}.{number}" if number and role != DOWN else f"{module}.{layer}"
            owners[f"{module}.{layer}"] = owner
            numbers = [int(number)] if number else range(experts.count)
            (second if role == DOWN else first).update(dict.fromkeys(numbers, owner))
        return cls(module, experts, owners, first, second)

    @property
    def transposed(self) -> list[str]:
        """Names of fused layers that are stored as [E,K,N]."""
        fused = (f"{self.module}.{layer}" for layer in self.experts.fused_layers)
        return [name for name in fused if name in self.owners] if self.experts.transposed else []

    @property
    def widths(self) -> dict[str, int]:
        """K by owner."""
        first = dict.fromkeys(self.first.values(), self.experts.columns)
        return first | dict.fromkeys(self.second.values(), self.experts.inner)

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None
    ) -> Iterator[tuple[tuple[str, ...], Tensor | None, list[int]]]:
        """Owners, the inputs [n,K] of one call, one owner's after the other's, and how many each gets.

        The inputs are as of :meth:`Experts.routed`, and None where they can't be computed.
        """
        routed = self.experts.routed(args, kwargs, mask)
        for rows, counts in () if routed is None else routed.groups():
            parts = rows.split(counts)
            for owners in (self.first, self.second):
                numbers = sorted(owners)
                own = [counts[expert] for expert in numbers]
                if any(own):
                    found = self._second(parts) if owners is self.second else rows
                    if owners is self.first and len(numbers) < len(parts):
                        found = torch.cat([parts[expert] for expert in numbers])
                    yield tuple(owners[expert] for expert in numbers), found, own

    def _second(self, parts: Sequence[Tensor]) -> Tensor | None:
        each = [self.experts.inputs_of_second(one, parts[one]) for one in sorted(self.second) if len(parts[one])]
        known = [one for one in each if one is not None]
        return torch.cat(known) if len(known) == len(each) else None


def find_experts(model: nn.Module) -> tuple[dict[str, Experts], dict[str, str]]:
    """Modules of experts by name, and by name why others are not understood."""
    found: dict[str, Experts] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        banks = {key: one for key, one in module.named_parameters(recurse=False) if one.dim() == 3}
        if DOWN not in banks or not {GATE_UP, UP} & banks.keys():
            continue
        experts = _understood(module, banks)
        if isinstance(experts, Experts):
            found[name] = experts
        else:
            refused[name] = experts
    return found, refused


def _understood(module: Any, banks: Mapping[str, Tensor]) -> Experts | str:
    gated = GATE_UP in banks
    first, second = banks[GATE_UP if gated else UP], banks[DOWN]
    gate = getattr(module, "_apply_gate", None) if gated else getattr(module, "act_fn", None)
    if not callable(gate) or getattr(module, "has_gate", gated) != gated or GATE in banks:
        return "they run in a way of their own"
    if not gated and not hasattr(module, "has_gate"):
        return "they run in a way of their own"
    if first.dtype not in FLOATS or second.dtype not in FLOATS:
        return f"their weights are {first.dtype}".replace("torch.", "")
    if getattr(module, "_is_expert_parallel", False):
        return "they are spread over processes"
    count, sides = first.shape[0], 2 if gated else 1
    for transposed in (False, True) if gated else (bool(getattr(module, "is_transposed", False)),):
        features, columns = (1, 2) if not transposed else (2, 1)
        inner = second.shape[columns]
        if (first.shape[columns], first.shape[features]) == (second.shape[features], sides * inner):
            return Experts(module, count, first.shape[columns], inner, gated, transposed)
    return f"their weights are {list(first.shape)} and {list(second.shape)}, which do not fit"


def bounded(options: Mapping[str, int], widths: Collection[int], limit: int = SUMS_LIMIT) -> dict[str, int]:
    """Options of accumulators of these widths [K], whose second moments then take ``limit`` bytes at most together.

    As they are where that fits; else as many eigenpairs as fit, else the diagonals alone.
    """
    gram_limit, rank = options["gram_limit"], options["rank"]
    # float64
    columns = (width if width <= gram_limit else rank + OVERSAMPLING if rank else 0 for width in widths)
    if 8 * sum(width * kept for width, kept in zip(widths, columns, strict=True)) <= limit:
        return dict(options)
    fitting = min(rank, limit // (8 * sum(widths)) - OVERSAMPLING)
    return {"gram_limit": 0, "rank": fitting if fitting >= FEWEST else 0}


def _is_integer(one: Tensor) -> bool:
    return not (one.is_floating_point() or one.is_complex() or one.dtype == torch.bool)
