"""The source of damage.py, and what was made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from damage import RAGGED

from checkpoints import FLAGS, convert, save


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("source") / "in.safetensors", RAGGED, {"format": "pt"})


@pytest.fixture(scope="module")
def good(source) -> Callable[[str], Path]:
    """The source in a format, converted once."""

    def path(name: str) -> Path:
        target = source.with_name(f"{name}.safetensors")
        if not target.exists():
            convert(source, target, *FLAGS[name])
        return target

    return path
