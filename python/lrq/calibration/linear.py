"""Which modules are linear layers, and what their weights are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def identity(module: nn.Module) -> int:
    """The same of modules that share a weight; a weight that is computed (parametrizations) is of its module alone."""
    own = module._parameters.get("weight")
    return id(module) if own is None else id(own)


def is_transposed(module: nn.Module) -> bool:
    # By name: transformers need not be installed.
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__) and not isinstance(module, nn.Conv1d)


def is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    if weight.dim() == 3:
        return not isinstance(module, nn.modules.conv._ConvNd)
    features = getattr(module, "in_features", None)
    return weight.dim() == 2 and (is_transposed(module) or features == weight.shape[1])


def columns_of(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[0] if is_transposed(module) else weight.shape[-1])
