"""Hooks that watch what flows into the linear layers of a torch module."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lrq.calibration.accumulator import GRAM_LIMIT, RANK, Accumulator
from lrq.calibration.inputs import InputStats
from lrq.calibration.naming import PrefixRule, prefix_rule
from lrq.calibration.stats import MEASURED, save_stats
from lrq.errors import InputError, printable

Choice = str | Collection[str] | Callable[[str], bool] | None
"""Layers: a regular expression that is searched for in their names, the names, or a test of a name."""


class Collector:
    """Statistics of the inputs of layers while the ``with`` statement runs; entered again, it goes on.

    A layer is a module whose ``weight`` acts linearly on its first input: [N,K] of ``nn.Linear`` and what is like it,
    [K,N] of transformers' ``Conv1D`` (noted as transposed), [E,N,K] of a bank of experts, whose inputs count together.
    Modules that share one weight see the inputs of all of them.
    """

    mask: Tensor | None = None
    """bool [..]: tokens that count, of inputs [..,K] with the same leading dimensions; set it before each batch."""

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
        if _is_linear(model) and chosen(""):
            raise InputError("the model is a single layer, which has no name; put it into a module")
        self._modules = {name: module for name, module in model.named_modules() if _is_linear(module) and chosen(name)}
        if not self._modules:
            raise InputError("the model has no linear layer of these names to collect inputs of")
        self._device, self._options = device, {"gram_limit": gram_limit, "rank": rank}
        # Weights may be replaced while the model runs, where they are offloaded; who shares one is known now.
        first: dict[int, str] = {}
        self._owner = {name: first.setdefault(id(one.weight), name) for name, one in self._modules.items()}
        self._accumulators: dict[str, Accumulator] = {}
        self._hooks: list[Any] = []
        self._lock = threading.Lock()
        self.rule, self.unmatched = PrefixRule(), list[str]()
        """How names of modules become keys of the checkpoint, and modules that are none of its layers."""
        self._keys = {name: name for name in self._modules}
        if keys is not None:
            self._match(frozenset(key.removesuffix(".weight") for key in keys))

    def _match(self, keys: frozenset[str]) -> None:
        self.rule = prefix_rule(self._modules.keys(), keys)
        renamed = {name: self.rule(name) for name in self._modules}
        self._keys = {name: key for name, key in renamed.items() if key is not None and key in keys}
        self.unmatched = [name for name in self._modules if name not in self._keys]

    def __enter__(self) -> Collector:
        if self._hooks:
            raise InputError("the collector runs already; leave its with statement first")
        self._hooks = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook(self, name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() and x.shape[-1] == _columns(module):
                # What is added up must outlive inference mode.
                with torch.inference_mode(False), torch.no_grad():
                    self._add(self._owner[name], x)

        return watch

    def _add(self, owner: str, x: Tensor) -> None:
        with self._lock:
            self._add_alone(owner, x)

    def _add_alone(self, owner: str, x: Tensor) -> None:
        accumulator = self._accumulators.get(owner)
        if accumulator is None:
            accumulator = self._accumulators[owner] = Accumulator(x.shape[-1], **self._options)
        masked = self.mask is not None and self.mask.shape == x.shape[:-1]
        mask = self.mask.to(x.device) if masked and self.mask is not None else None
        if self._device is not None:
            x, mask = x.to(self._device), None if mask is None else mask.to(self._device)
        accumulator.update(x, mask)

    @property
    def tokens(self) -> int:
        """The most that a layer saw."""
        return max((one.count for one in self._accumulators.values()), default=0)

    @property
    def unseen(self) -> list[str]:
        """Keys of layers that saw no input."""
        return [key for name, key in self._keys.items() if not self._seen(name)]

    def _seen(self, name: str) -> Accumulator | None:
        return self._accumulators.get(self._owner[name])

    def stats(self) -> dict[str, InputStats]:
        """What was seen so far, by key of the checkpoint.

        Raises:
            InputError: an input was not finite.
        """
        found = {}
        for name, key in self._keys.items():
            accumulator = self._seen(name)
            try:
                one = None if accumulator is None else accumulator.result()
            except ValueError as error:
                raise InputError(f"layer {printable(key)}: {error}; its statistics mean nothing") from None
            if one is not None:
                found[key] = one
        return found

    def save(self, path: str | os.PathLike[str], **about: str) -> None:
        """Write ``stats.safetensors``.

        Raises:
            InputError: no layer saw an input, or the file can't be written.
        """
        transposed = [key for name, key in self._keys.items() if _is_transposed(self._modules[name])]
        save_stats(path, self.stats(), MEASURED, **about, transposed="\n".join(transposed))


def collect(model: nn.Module, layers: Choice = None, **options: Any) -> Collector:
    """Collect statistics of the inputs of a model's linear layers; use it in a ``with`` statement.

    Args:
        model: any module; where it is called, in what dtype and on which device does not matter.
        layers: a regular expression, names or a test of names; all layers if absent.
        keys: names of a checkpoint's tensors, to which names of modules are matched by one prefix (``.rule``;
            ``.unmatched`` lists the others); without it statistics are named as modules.
        device: where sums are kept; where the inputs are, if absent.
        gram_limit, rank: as of :class:`~lrq.calibration.accumulator.Accumulator`.

    Raises:
        InputError: no such layer, or a bad regular expression.
    """
    return Collector(model, layers, **options)


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


def _is_transposed(module: nn.Module) -> bool:
    # By name: transformers need not be installed.
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__) and not isinstance(module, nn.Conv1d)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    if weight.dim() == 3:
        return not isinstance(module, nn.modules.conv._ConvNd)
    features = getattr(module, "in_features", None)
    return weight.dim() == 2 and (_is_transposed(module) or features == weight.shape[1])


def _columns(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[0] if _is_transposed(module) else weight.shape[-1])
