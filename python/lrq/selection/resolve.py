"""Settings whose values name files, replaced by what the files say: a configuration holds everything itself."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from lrq.config import Storage
from lrq.errors import InputError
from lrq.selection.layer_config import load_table as load_layer_config
from lrq.selection.layer_config import read_rules
from lrq.selection.policies import load_preset

_STORAGE = {setting.name for setting in dataclasses.fields(Storage)}


def resolve(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with ``layer_config`` and ``preset`` files read.

    Raises:
        InputError: a file that can't be read, or that says something wrong.
    """
    resolved = dict(settings)
    config = settings.get("layer_config")
    if config is not None:
        base = Storage(**{key: value for key, value in settings.items() if key in _STORAGE})
        if isinstance(config, str | os.PathLike):
            resolved["layer_config"] = load_layer_config(config, base)
        else:
            read_rules(config, base, False)
    given = settings.get("preset")
    if given is not None:
        names = [given] if isinstance(given, str | dict | os.PathLike) else given
        if not isinstance(names, list | tuple):
            raise InputError(f"--preset: must be names or files, got {given!r}")
        resolved["preset"] = tuple(_preset(name) for name in names)
    return resolved


def _preset(name: Any) -> Any:
    if isinstance(name, os.PathLike) or (isinstance(name, str) and name.endswith(".toml")):
        return load_preset(os.fspath(name))
    if not isinstance(name, str | dict):
        raise InputError(f"--preset: must be a name or a file, got {name!r}")
    return name
