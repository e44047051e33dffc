"""Hooks that watch what flows into the linear layers of a torch module, those of experts among them."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lrq.calibration.accumulator import GRAM_LIMIT, RANK, Accumulator
from lrq.calibration.bank import Bank
from lrq.calibration.experts import Experts, Route, bounded, find_experts
from lrq.calibration.inputs import InputStats
from lrq.calibration.linear import columns_of, identity, is_linear, is_transposed
from lrq.calibration.naming import PrefixRule, match_experts, prefix_rule
from lrq.calibration.recent import Recent
from lrq.calibration.stats import MEASURED, save_stats
from lrq.errors import InputError, printable

Choice = str | Collection[str] | Callable[[str], bool] | None
"""Layers: a regular expression that is searched for in their names, the names, or a test of a name."""


class Collector:
    """Statistics of the inputs of layers while the ``with`` statement runs; entered again, it goes on.

    A layer is a module whose ``weight`` acts linearly on its first input: [N,K] of ``nn.Linear`` and what is like it,
    [K,N] of transformers' ``Conv1D`` (noted as transposed), [E,N,K] of a bank of experts, whose inputs count together.
    Modules that share one weight see the inputs of all of them.

    Of a module that runs many experts (:mod:`lrq.calibration.experts`) every expert's layers are layers:
    ``mlp.experts.3.gate_proj`` and ``up_proj`` see the tokens that go to expert 3, ``down_proj`` what becomes of them.
    Where the checkpoint has all experts in one tensor, their inputs count together.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Choice = None,
        *,
        keys: Collection[str] | None = None,
        device: torch.device | str | None = None,
        gram_limit: int = GRAM_LIMIT,
        rank: int = RANK,
    ) -> None:
        chosen = _test_of(layers)
        experts, refused = find_experts(model)
        if (is_linear(model) or "" in experts) and chosen(""):
            raise InputError("the model is a single layer, which has no name; put it into a module")
        every = model.named_modules(remove_duplicate=False)
        self._modules = {name: module for name, module in every if is_linear(module) and chosen(name)}
        self._device, self._options = device, {"gram_limit": gram_limit, "rank": rank}
        # Weights may be replaced while the model runs, where they are offloaded; who shares one is known now.
        first: dict[int, str] = {}
        self._owner = {name: first.setdefault(identity(one), name) for name, one in self._modules.items()}
        self._mask: Tensor | None = None
        self._unmasked: set[str] = set()
        self._accumulators: dict[str, Accumulator] = {}
        self._banks: dict[tuple[str, ...], Bank] = {}
        self._hooks: list[Any] = []
        self._lock, self._recent = threading.Lock(), Recent()
        self.rule, self.unmatched = PrefixRule(), list[str]()
        """How names of modules become keys of the checkpoint, and modules that are none of its layers."""
        self._keys = {name: name for name in self._modules}
        self._routes: list[Route] = []
        self.refused = {name: why for name, why in refused.items() if chosen(name)}
        """Modules of experts that are not collected, or only in part, and why."""
        layers = {name: {one: f"{name}.{one}" for one in each.layers} for name, each in experts.items()}
        if keys is not None:
            layers = self._match(frozenset(key.removesuffix(".weight") for key in keys), experts)
        for name, found in layers.items():
            if not found and chosen(name):
                self.refused[name] = "the checkpoint has no layers of theirs under a name that is known"
            self._watch_experts(
                name, experts[name], {one: key for one, key in found.items() if chosen(f"{name}.{one}")}
            )
        if not self._owner:
            raise InputError("the model has no linear layer of these names to collect inputs of")
        widths = {owner: width for route in self._routes for owner, width in route.widths.items()}
        self._expert_options = bounded(self._options, widths.values())

    def _match(self, keys: frozenset[str], experts: Mapping[str, Experts]) -> dict[str, dict[str, str]]:
        names = {f"{name}.{one}" for name, each in experts.items() for one in (*each.layers, *each.fused_layers)}
        self.rule = prefix_rule(names | self._modules.keys(), keys)
        renamed = {name: self.rule(name) for name in self._modules}
        self._keys = {name: key for name, key in renamed.items() if key is not None and key in keys}
        self.unmatched = [name for name in self._modules if name not in self._keys]
        banks = {name: (each.count, each.gated) for name, each in experts.items()}
        return match_experts(banks, keys.difference(self._keys.values()), self.rule)

    def _watch_experts(self, name: str, experts: Experts, keys: Mapping[str, str]) -> None:
        if keys:
            route = Route.of(name, experts, keys)
            self._routes.append(route)
            self._owner |= route.owners
            self._keys |= {f"{name}.{layer}": key for layer, key in keys.items()}

    def __enter__(self) -> Collector:
        if self._hooks:
            raise InputError("the collector runs already; leave its with statement first")
        once = {id(module): name for name, module in reversed(self._modules.items())}
        self._hooks = [
            self._modules[name].register_forward_pre_hook(uncompiled(self._hook(name)), with_kwargs=True)
            for name in reversed(once.values())
        ]
        self._hooks += [
            route.experts.module.register_forward_pre_hook(uncompiled(self._expert_hook(route)), with_kwargs=True)
            for route in self._routes
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        with self._lock:
            self._recent.forget()

    def _hook(self, name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() and x.shape[-1] == columns_of(module):
                # What is added up must outlive inference mode.
                with torch.inference_mode(False), torch.no_grad():
                    self._add(self._owner[name], x, self._mask_of(name, x), self._options)

        return watch

    def _expert_hook(self, route: Route) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with torch.inference_mode(False), torch.no_grad():
                for owners, rows, counts in route.inputs(args, kwargs, self.mask):
                    if rows is None:
                        self.refused[route.module] = (
                            "their weights are offloaded, and inputs of down_proj are not known"
                        )
                    elif len(set(owners)) == 1:
                        self._add(owners[0], rows, None, self._expert_options)
                    else:
                        self._add_apart(owners, rows, counts)

        return watch

    @property
    def mask(self) -> Tensor | None:
        """bool [..]: tokens that count, of inputs [..,K] with the same leading dimensions but for those of 1, or with
        these in one; set it before each batch. Layers whose inputs are others are in ``unmasked``."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"mask: must be a bool tensor of the tokens that count, is {kind}; take mask.bool()")
        self._mask = mask

    @property
    def unmasked(self) -> list[str]:
        """Keys of layers of whose inputs every token counted, as a mask had another shape."""
        return [key for name, key in self._keys.items() if name in self._unmasked]

    def _mask_of(self, name: str, x: Tensor) -> Tensor | None:
        if self.mask is None:
            return None
        # Some layers get the tokens of all texts in one dimension, or have one of 1 for heads.
        shape, wanted = ([size for size in one if size != 1] for one in (x.shape[:-1], self.mask.shape))
        if shape in (wanted, [self.mask.numel()]):
            return self.mask
        # One input a text has no padding.
        if shape != wanted[:1]:
            self._unmasked.add(name)
        return None

    def _add(self, owner: str, x: Tensor, mask: Tensor | None, options: dict[str, int]) -> None:
        with self._lock:
            accumulator = self._accumulator(owner, x.shape[-1], options)
            for sums in self._recent.sums(accumulator, x, mask, self._device or x.device):
                accumulator.add(sums)

    def _add_apart(self, owners: tuple[str, ...], rows: Tensor, counts: list[int]) -> None:
        with self._lock:
            if owners not in self._banks:
                each = [self._accumulator(owner, rows.shape[-1], self._expert_options) for owner in owners]
                self._banks[owners] = Bank(each)
            self._banks[owners].update(rows.to(self._device or rows.device), counts)

    def _accumulator(self, owner: str, columns: int, options: dict[str, int]) -> Accumulator:
        if owner not in self._accumulators:
            self._accumulators[owner] = Accumulator(columns, **options)
        return self._accumulators[owner]

    @property
    def tokens(self) -> int:
        """The most that a layer saw."""
        return max((one.count for one in self._accumulators.values()), default=0)

    @property
    def reduced(self) -> str:
        """What is kept of the second moments of experts that are too many for what was asked; else empty."""
        if self._expert_options == self._options:
            return ""
        rank = self._expert_options["rank"]
        return f"{rank} eigenpairs" if rank else "the diagonals alone"

    @property
    def seen(self) -> list[str]:
        """Keys of layers that saw an input."""
        return [key for name, key in self._keys.items() if self._saw(name)]

    @property
    def unseen(self) -> list[str]:
        """Keys of layers that saw no input, as experts that no token went to."""
        return [key for name, key in self._keys.items() if not self._saw(name)]

    def _saw(self, name: str) -> bool:
        accumulator = self._accumulators.get(self._owner[name])
        return accumulator is not None and accumulator.count > 0

    def stats(self) -> dict[str, InputStats]:
        """What was seen so far, by key of the checkpoint.

        Raises:
            InputError: an input was not finite.
        """
        found: dict[str, InputStats] = {}
        results: dict[str, InputStats | None] = {}
        for name, key in self._keys.items():
            owner = self._owner[name]
            if owner not in results:
                try:
                    results[owner] = self._accumulators[owner].result() if self._saw(name) else None
                except ValueError as error:
                    raise InputError(f"layer {printable(key)}: {error}; its statistics mean nothing") from None
            one = results[owner]
            if one is not None:
                found[key] = one
        return found

    def save(self, path: str | os.PathLike[str], **about: str) -> None:
        """Write ``stats.safetensors``.

        Raises:
            InputError: no layer saw an input, or the file can't be written.
        """
        names = [name for name, one in self._modules.items() if is_transposed(one)]
        names += [name for route in self._routes for name in route.transposed]
        transposed = [self._keys[name] for name in names if name in self._keys]
        save_stats(path, self.stats(), MEASURED, **about, transposed="\n".join(transposed))


def collect(model: nn.Module, layers: Choice = None, **options: Any) -> Collector:
    """Collect statistics of the inputs of a model's linear layers; use it in a ``with`` statement.

    Args:
        model: any module; where it is called, in what dtype and on which device does not matter.
        layers: a regular expression, names or a test of names; all layers if absent.
        keys: names of a checkpoint's tensors, to which names of modules are matched by one prefix (``.rule``;
            ``.unmatched`` lists the others), and modules of experts by their numbers as well (``.refused`` lists
            those that are not collected); without it statistics are named as modules, and layers of experts
            ``experts.3.gate_proj``, ``up_proj`` and ``down_proj``.
        device: where sums are kept; where the inputs are, if absent.
        gram_limit, rank: as of :class:`~lrq.calibration.accumulator.Accumulator`; of experts as much of it as fits
            into 8 GiB together.

    Raises:
        InputError: no such layer, or a bad regular expression.
    """
    return Collector(model, layers, **options)


def uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, out of the reach of ``torch.compile``, which may put sums that are equal into one tensor."""
    # Without that module nothing is compiled yet, and it takes a second to import.
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def _test_of(layers: Choice) -> Callable[[str], bool]:
    if layers is None:
        return lambda name: True
    if callable(layers):
        return layers
    if not isinstance(layers, str):
        names = frozenset(layers)
        return lambda name: name in names
    try:
        pattern = re.compile(layers)
    except re.error as error:
        raise InputError(f"layers {printable(layers)}: no regular expression: {error}") from None
    return lambda name: pattern.search(name) is not None
