"""The name under which something is written: what it may be, before any work is done."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from lrq.checkpoint.layout import ENDING, INDEX, Layout, partial_of
from lrq.checkpoint.sources import SHARD, made_by_lrq
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
    """Raise :class:`InputError` for a target that can't be written, or that is one of the files that are read.

    Nor may one of those have the name that the target has while it is not whole.
    """
    read = [file for file in inputs if file is not None and os.path.exists(file)]
    for target in targets:
        for own in (partial_of(target), journal_of(target)):
            if own.exists() and any(os.path.samefile(own, file) for file in read):
                raise InputError(f"{own}: is an input, and the name of {target.name} while it is written; rename it")
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


def journal_of(target: Path) -> Path:
    """The journal of an output that is not whole yet."""
    partial = partial_of(target)
    return partial.with_name(partial.name + ".journal")


def other_form(layout: Layout) -> Path:
    """The target of the same output in another form: an index for one file, one file for an index."""
    stem = _stem(layout)
    return layout.target.with_name(stem + (ENDING if layout.index is not None else INDEX))


def unfinished_shards(layout: Layout) -> list[Path]:
    """Shards of an output of this name that are not whole, whatever their number, which are not of this layout."""
    own = {partial_of(file.path) for file in layout.files}
    partials = layout.target.parent.glob(f"{glob.escape(_stem(layout))}-?????-of-?????{ENDING}.partial")
    return sorted(path for path in partials if path not in own)


def remains(layout: Layout, inputs: Iterable[str | os.PathLike[str] | None]) -> list[Path]:
    """What lrq wrote under this name in another number of files: a loader that finds it reads the old model.

    Files that it did not write, and those that are read now, are none of it.
    """
    stem, folder = _stem(layout), layout.target.parent
    own = {layout.target, *(file.path for file in layout.files)}
    read = [file for file in inputs if file is not None and os.path.exists(file)]
    shards = [path for path in folder.glob(f"{glob.escape(stem)}-?????-of-?????{ENDING}") if SHARD.fullmatch(path.name)]
    files = [path for path in (folder / f"{stem}{ENDING}", *sorted(shards)) if path not in own]
    found = [
        path
        for path in files
        if path.is_file() and not any(os.path.samefile(path, file) for file in read) and made_by_lrq(str(path))
    ]
    index = folder / f"{stem}{INDEX}"
    # An index is as its shards are.
    if index not in own and index.is_file() and any(path in found for path in shards):
        found.append(index)
    return found


def _stem(layout: Layout) -> str:
    return layout.target.name.removesuffix(INDEX).removesuffix(ENDING)
