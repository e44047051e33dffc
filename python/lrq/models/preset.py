"""Presets: what is known of a model, read from TOML files."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lrq.errors import InputError, printable
from lrq.models.patterns import Patterns

NONE = "none"
"""The name that asks for no preset."""
GENERIC = "generic"
"""The name of the policy for a model that no preset is known of."""
ANYWHERE = "*"
"""In front of a key: what follows it may stand anywhere in a name."""
_RULE_KEYS = {"why": str, "patterns": list, "formats": list, "format": str, "when": list}
_IDENTITY_KEYS = {"keys": list, "absent": list, "shapes": dict, "unlike": list, "family": str}
_KEYS = {"about": str, "family": str, "flags": list, "activation": str}
_KEYS |= {"identify": list, "keep": list, "drop": list, "rules": list}


@dataclass(frozen=True)
class Rule:
    """What is done with the modules that one of the patterns finds."""

    why: str
    patterns: Patterns
    formats: tuple[str, ...] | None = None
    """Formats that the user's own rules may choose for a module that is kept; None: any."""
    format: str = ""
    """Format that ``when`` is replaced by."""
    when: tuple[str, ...] = ()


@dataclass(frozen=True)
class Identity:
    """One way to tell the model: names and shapes of its tensors, without prefix."""

    keys: tuple[str, ...]
    """Tensors that must be there; one that ends in a dot stands for all that begin so, and one that begins with ``*``, as
    any but the first may, for all that hold what follows."""
    absent: tuple[str, ...] = ()
    shapes: dict[str, list[int]] = field(default_factory=dict)
    unlike: tuple[dict[str, list[int]], ...] = ()
    """Shapes of other models."""
    family: str = ""


@dataclass(frozen=True, eq=False)
class Preset:
    """What to keep, to drop and to store otherwise in one model."""

    name: str
    about: str
    family: str
    flags: tuple[str, ...]
    identify: tuple[Identity, ...]
    keep: tuple[Rule, ...]
    drop: tuple[Rule, ...]
    rules: tuple[Rule, ...]
    activation: str = ""
    """The function between the layers of a block's MLP, as lrq.calibration.activations names it; empty: not known."""

    def finds(self, module: str) -> bool:
        """Whether any of its patterns finds the module."""
        return any(rule.patterns.finds(module) for rule in (*self.keep, *self.drop, *self.rules))


def read_preset(name: str, table: dict[str, Any]) -> Preset:
    """A preset from its table.

    Raises:
        InputError: a missing or unknown key, or a value of the wrong type.
    """
    _check(name, table, _KEYS, ("about",))
    identify = []
    for identity in table.get("identify", []):
        _check(f"{name}: identify", identity, _IDENTITY_KEYS, ("keys",))
        identify.append(Identity(**{key: _frozen(value) for key, value in identity.items()}))
    rules = {kind: tuple(read_rules(name, table, kind)) for kind in ("keep", "drop", "rules")}
    family, flags = table.get("family", name), tuple(table.get("flags", ()))
    return Preset(name, table["about"], family, flags, tuple(identify), **rules, activation=table.get("activation", ""))


def read_rules(name: str, table: dict[str, Any], kind: str) -> Iterator[Rule]:
    """The rules of one kind: ``keep``, ``drop``, ``rules`` or, of the generic policy, ``always``."""
    for rule in table.get(kind, []):
        _check(f"{name}: {kind}", rule, _RULE_KEYS, ("why", "patterns"))
        if not rule["patterns"] or not all(isinstance(pattern, str) and pattern for pattern in rule["patterns"]):
            raise InputError(f"preset {name}: {kind}: patterns must be a list of names")
        if kind == "rules" and "format" not in rule:
            raise InputError(f"preset {name}: rules: {rule['why']}: format is missing")
        yield Rule(**{**{key: _frozen(value) for key, value in rule.items()}, "patterns": Patterns(rule["patterns"])})


def _check(where: str, table: Any, known: Mapping[str, type], required: tuple[str, ...]) -> None:
    if not isinstance(table, dict):
        raise InputError(f"preset {where}: must be a table")
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"preset {where}: no such key {printable(key)}; {hint}")
        if not isinstance(value, known[key]):
            raise InputError(f"preset {where}: {key} must be a {known[key].__name__}, is {printable(str(value))}")
    for key in required:
        if key not in table:
            raise InputError(f"preset {where}: {key} is missing")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@cache
def presets() -> dict[str, Preset]:
    """The presets of the package by name."""
    folder = resources.files(__package__).joinpath("presets")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    named = ((file.name.removesuffix(".toml"), file.read_text(encoding="utf-8")) for file in files)
    return {name: read_preset(name, tomllib.loads(text)) for name, text in named}


@cache
def by_flag() -> dict[str, Preset]:
    """Presets by every name that the command line takes."""
    named = dict(presets())
    named |= {flag: preset for preset in presets().values() for flag in preset.flags}
    return dict(sorted(named.items()))


def load_table(name: str) -> dict[str, Any]:
    """The table of a preset's TOML file; raises :class:`InputError`."""
    try:
        table = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--preset {name}: can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"--preset {name}: not a TOML file: {printable(str(error))}") from None
    read_preset(Path(name).stem, table)
    return {"name": Path(name).stem, **table}


def find_preset(name: str | dict[str, Any]) -> Preset:
    """A preset by name or flag, or from the table of a file; raises :class:`InputError` naming the nearest."""
    if isinstance(name, dict):
        return read_preset(str(name.get("name", "file")), {key: name[key] for key in name if key != "name"})
    if not isinstance(name, str):
        raise InputError(f"--preset: must be a name or a table, is {printable(str(name))}")
    if name in by_flag():
        return by_flag()[name]
    near = difflib.get_close_matches(name, by_flag(), 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(presets())}, {NONE}, or a .toml file"
    raise InputError(f"--preset {printable(name)}: no such preset; {hint}")
