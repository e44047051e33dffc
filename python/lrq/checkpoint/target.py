"""The name under which something is written: what it may be, before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lrq.checkpoint.layout import ENDING, INDEX
from lrq.errors import InputError

FOREIGN = (".bin", ".ckpt", ".gguf", ".h5", ".json", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth")
"""Endings of files that are not safetensors: a loader would take the output for what it is not."""


def target_of(output: str | os.PathLike[str]) -> Path:
    """The file that ``output`` names: behind a link, what it points to.

    Raises:
        InputError: no name, that of a folder, or one of another kind of file.
    """
    name = os.fspath(output)
    if not name:
        raise InputError("--output: the name is empty; name a file")
    if Path(name).suffix.lower() in FOREIGN and not name.endswith(INDEX):
        raise InputError(f"{name}: lrq writes safetensors; let the name end in .safetensors")
    if name.endswith(os.sep):
        raise InputError(f"{name}: names a folder; name a file")
    name = f"{name.removesuffix(INDEX)}{ENDING}" if name.endswith(INDEX) else name
    return Path(os.path.realpath(name)) if os.path.islink(name) else Path(name)


def check_targets(targets: Iterable[Path], inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    """Raise :class:`InputError` for a target that can't be written, or that is one of the files that are read."""
    read = [file for file in inputs if file is not None and os.path.exists(file)]
    for target in targets:
        if not target.parent.is_dir():
            raise InputError(f"{target.parent}: no such folder; make it first")
        if target.is_dir():
            raise InputError(f"{target}: is a folder; name a file")
        if not target.exists():
            continue
        if not target.is_file():
            raise InputError(f"{target}: is a device or a pipe; name a file")
        if any(os.path.samefile(target, file) for file in read):
            raise InputError(f"{target}: output and input are the same file")
        if not os.access(target, os.W_OK):
            raise InputError(f"{target}: exists and is read-only; name another file")
