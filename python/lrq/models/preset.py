"""Presets: what is known of a model, read from TOML files."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
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
ANY = "any"
"""The family of a preset for models of every family."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _are_shapes(value: Any) -> bool:
    shapes = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(shape, list) and all(type(side) is int for side in shape) for shape in shapes)


_Kind = tuple[str, Callable[[Any], bool]]
_TEXT: _Kind = ("a str", _is_text)
_LIST: _Kind = ("a list", lambda value: isinstance(value, list))
_NAMES: _Kind = ("a list of names", _are_names)
_SOME_NAMES: _Kind = ("a list of names, one at least", lambda value: value != [] and _are_names(value))
_SHAPES: _Kind = ("a table of lists of integers", _are_shapes)
_MORE_SHAPES: _Kind = (
    "a list of tables of lists of integers",
    lambda value: isinstance(value, list) and all(map(_are_shapes, value)),
)
_RULE_KEYS = {"why": _TEXT, "patterns": _SOME_NAMES}
_KEEP_KEYS = {**_RULE_KEYS, "formats": _NAMES}
_KINDS = {
    "keep": _KEEP_KEYS,
    "always": _KEEP_KEYS,
    "drop": _RULE_KEYS,
    "rules": {**_RULE_KEYS, "format": _TEXT, "when": _SOME_NAMES},
}
"""What a rule says, by its kind; all but ``formats`` must be said."""
_IDENTITY_KEYS = {"keys": _SOME_NAMES, "absent": _NAMES, "shapes": _SHAPES, "unlike": _MORE_SHAPES, "family": _TEXT}
_KEYS = {"about": _TEXT, "family": _TEXT, "flags": _NAMES, "activation": _TEXT}
_KEYS |= {"identify": _LIST, "keep": _LIST, "drop": _LIST, "rules": _LIST}


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
    """Tensors that must be there; one that ends in a dot stands for all that begin so, one that begins with ``*`` (not
    the first) for all that hold what follows."""
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
    """Of the models that it is for; ``any``: it does not say."""
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


def read_preset(name: str, table: dict[str, Any], where: str = "") -> Preset:
    """A preset from its table; ``where`` names it in errors.

    Raises:
        InputError: a missing or unknown key, or a value of the wrong type.
    """
    where = where or f"preset {printable(name)}"
    _check(where, table, _KEYS, ("about",))
    identify = []
    for number, identity in enumerate(table.get("identify", []), 1):
        _check(f"{where}: identify {number}", identity, _IDENTITY_KEYS, ("keys",))
        if identity["keys"][0].startswith(ANYWHERE):
            raise InputError(f"{where}: identify {number}: the first of keys must be a name, or its start")
        identify.append(Identity(**{key: _frozen(value) for key, value in identity.items()}))
    rules = {kind: tuple(read_rules(table, kind, where)) for kind in ("keep", "drop", "rules")}
    family, flags = table.get("family", ANY), tuple(table.get("flags", ()))
    return Preset(name, table["about"], family, flags, tuple(identify), **rules, activation=table.get("activation", ""))


def read_rules(table: dict[str, Any], kind: str, where: str) -> Iterator[Rule]:
    """The rules of one kind: ``keep``, ``drop``, ``rules`` or, of the generic policy, ``always``."""
    for number, rule in enumerate(table.get(kind, []), 1):
        _check(f"{where}: {kind} {number}", rule, _KINDS[kind], _KINDS[kind].keys() - {"formats"})
        yield Rule(**{**{key: _frozen(value) for key, value in rule.items()}, "patterns": Patterns(rule["patterns"])})


def _check(where: str, table: Any, known: Mapping[str, _Kind], required: Collection[str]) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{where}: must be a table")
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"{where}: no such key {printable(key)}; {hint}")
        words, fits = known[key]
        if not fits(value):
            raise InputError(f"{where}: {key} must be {words}, is {printable(repr(value))}")
    for key in known:
        if key in required and key not in table:
            raise InputError(f"{where}: {key} is missing")


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
    read_preset(Path(name).stem, table, f"--preset {name}")
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
