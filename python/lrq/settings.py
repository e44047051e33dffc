"""A setting: a field of a dataclass that carries its meaning and its limits beside its default."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

from lrq.errors import InputError


def setting(default: Any, meaning: str, **metadata: Any) -> Any:
    """A field; ``metadata`` are limits (``minimum``, ``maximum``, ``choices``) and how its flag looks."""
    return field(default=default, metadata={"meaning": meaning, **metadata})


_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "dict": (dict,),
    "tuple": (tuple,),
}


def check_ranges(part: Any) -> None:
    """Raise :class:`InputError` for a field of a part of the configuration that has a value of no meaning."""
    for one in dataclasses.fields(part):
        _check_range(one, getattr(part, one.name))


def _check_range(one: dataclasses.Field[Any], value: Any) -> None:
    limits = one.metadata
    if value is None and one.default is None:
        return
    kinds = _KINDS.get(str(one.type).removesuffix(" | None"))
    if kinds is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
        raise InputError(f"--{one.name}: must be {one.type.removesuffix(' | None')}, got {value!r}")
    if "choices" in limits and value not in limits["choices"]:
        raise InputError(f"--{one.name}: must be one of {', '.join(limits['choices'])}, got {value!r}")
    low, high = limits.get("minimum"), limits.get("maximum")
    # Written so that NaN fails.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"--{one.name}: must be {allowed}, got {value}")
