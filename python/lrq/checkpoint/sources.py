"""Which files a source is made of: one, the shards of an index, a folder, a glob."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from lrq.checkpoint.header import MAX_HEADER, Header, is_unicode, read_header
from lrq.checkpoint.layout import ENDING, INDEX, PROVENANCE
from lrq.errors import InputError, printable

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of PyTorch files."""
_ENDINGS = (ENDING, ".sft", *PICKLES)
COMPONENTS = ("transformer", "unet")
"""The folder of a diffusers pipeline that holds the model worth quantizing."""
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Source:
    """Files that are one checkpoint."""

    path: Path
    """What messages name: the file, the index, or what the shards would be as one file."""
    stem: Path
    """What outputs are named after, without an ending."""
    files: tuple[Path, ...]
    places: dict[str, str] = field(default_factory=dict)
    """File name by tensor, as an index says; empty without one."""

    def check(self, headers: Sequence[tuple[Path, Header]]) -> None:
        """Raise :class:`InputError` where a tensor is in two files, or not where the index has it."""
        owners: dict[str, Path] = {}
        for path, header in headers:
            for entry in header.entries:
                if entry.name in owners:
                    raise InputError(f"{path}: tensor {printable(entry.name)} is also in {owners[entry.name].name}")
                owners[entry.name] = path
        if not self.places:
            return
        folder = self.path.parent
        for name, file in self.places.items():
            if owners.get(name) != folder / file:
                raise InputError(f"{self.path}: tensor {printable(name)} is not in {printable(file)}")
        for name, path in owners.items():
            if name not in self.places:
                raise InputError(f"{self.path}: tensor {printable(name)} of {path.name} is missing from the index")


def find_source(path: str | os.PathLike[str]) -> Source:
    """The checkpoint that ``path`` names.

    Raises:
        InputError: no such file, a bad index, or a folder that holds none or several checkpoints.
    """
    try:
        return _find(os.fspath(path))
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: can't be opened: {error.strerror or error}") from None


def _find(name: str) -> Source:
    found = Path(name)
    if not name:
        raise InputError("the name of the checkpoint is empty; name one .safetensors file")
    if found.is_dir():
        return _in_folder(found)
    if is_glob(name):
        sources = expand([name])
        if len(sources) > 1:
            raise InputError(f"{printable(name)}: finds {len(sources)} checkpoints; name one")
        return _of_shards(_matches(name)) if _is_set(_matches(name)) else find_source(sources[0])
    if found.exists() and not found.is_file():
        raise InputError(f"{found}: is a pipe or a device; name one .safetensors file")
    return _of_index(found) if name.endswith(".json") else _of_file(found)


def expand(names: Sequence[str]) -> list[str]:
    """The checkpoints that names and globs stand for; a glob of the shards of one stays one.

    Raises:
        InputError: a glob that finds nothing.
    """
    expanded = []
    for name in names:
        if not is_glob(name):
            expanded.append(name)
            continue
        matches = _matches(name)
        if not matches:
            raise InputError(f"{printable(name)}: finds no file")
        expanded += [name] if _is_set(matches) else map(str, matches)
    return list({os.path.abspath(name): name for name in reversed(expanded)}.values())[::-1]


def is_glob(name: str) -> bool:
    """Whether a name stands for what it finds."""
    return glob.has_magic(name) and not os.path.lexists(name)


def made_by_lrq(name: str) -> bool:
    """Whether a checkpoint's metadata say that lrq wrote it; False of what can't be read."""
    try:
        path = find_source(name).files[0]
        with path.open("rb") as file:
            return PROVENANCE in read_header(file, path)[0].metadata
    except (InputError, OSError):
        return False


def _matches(pattern: str) -> list[Path]:
    return sorted(map(Path, glob.glob(pattern, recursive=True)))


def _is_set(paths: Sequence[Path]) -> bool:
    """Whether these are all shards of one checkpoint."""
    found = [SHARD.fullmatch(path.name) for path in paths]
    names = {(path.parent, one[1], one[3]) for path, one in zip(paths, found, strict=True) if one}
    if None in found or len(names) != 1:
        return False
    return sorted(int(one[2]) for one in found if one) == list(range(1, int(next(iter(names))[2]) + 1))


def _of_shards(paths: Sequence[Path]) -> Source:
    stem = SHARD.fullmatch(paths[0].name)
    path = paths[0].with_name(f"{stem[1] if stem else ''}{ENDING}")
    return Source(path, path.with_suffix(""), tuple(paths))


def _of_file(path: Path) -> Source:
    ending = next((ending for ending in _ENDINGS if path.name.endswith(ending)), "")
    return Source(path, path.with_name(path.name.removesuffix(ending) or path.name), (path,))


def _of_index(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_HEADER + 1)
    except OSError as error:
        raise InputError(f"{path}: can't be opened: {error.strerror}") from None
    if len(text) > MAX_HEADER:
        raise InputError(f"{path}: over {MAX_HEADER} bytes; not an index")
    try:
        index = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not an index of shards (not valid JSON)") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{path}: not an index of shards (no weight_map of tensors to files)")
    names = sorted(set(places.values()))
    for name in names:
        _check_name(path, name)
    stem = path.with_name(path.name.removesuffix(INDEX).removesuffix(".json") or path.name)
    return Source(path, stem, tuple(path.parent / name for name in names), places)


def _check_name(index: Path, name: str) -> None:
    """A shard lies in the folder of its index, or below; where a link leads is the user's own affair."""
    outside = any(
        pure.is_absolute() or pure.drive or pure.root or ".." in pure.parts
        for pure in (PurePosixPath(name), PureWindowsPath(name))
    )
    if outside or not name or "\0" in name:
        raise InputError(f"{index}: names {printable(name)!r}, which is not in its folder")
    if not is_unicode(name):
        raise InputError(f"{index}: names '{printable(name)}', which is not valid Unicode; correct the index")
    if name.endswith(PICKLES):
        raise InputError(
            f"{index}: names {printable(name)!r}, which is not a {ENDING} file but a PyTorch file, which can run code "
            f"when it is loaded; save the shards as {ENDING} first"
        )
    if not name.endswith(ENDING):
        raise InputError(f"{index}: names {printable(name)!r}, which is not a {ENDING} file")
    if (index.parent / name).exists() and not (index.parent / name).is_file():
        raise InputError(f"{index}: names {printable(name)!r}, which is not a file")


def _in_folder(folder: Path) -> Source:
    indexes = sorted(folder.glob(f"*{INDEX}"))
    files = sorted(path for path in folder.glob(f"*{ENDING}") if path.is_file())
    if len(indexes) == 1:
        return _named_after(folder, _of_index(indexes[0]))
    if not indexes and files and _is_set(files):
        return _named_after(folder, _of_shards(files))
    if not indexes and len(files) == 1:
        return _named_after(folder, _of_file(files[0]))
    if indexes or files:
        raise InputError(f"{folder}: is a folder of several checkpoints ({_listed(indexes + files)}); name one")
    for component in COMPONENTS:
        if (folder / "model_index.json").is_file() and (folder / component).is_dir():
            # Beside the pipeline: in it, the output would be taken for its checkpoint.
            return _named_after(folder, _in_folder(folder / component))
    pickles = sorted(path for path in folder.iterdir() if path.name.endswith(PICKLES) and path.is_file())
    pickle_indexes = sorted(path for ending in PICKLES for path in folder.glob(f"*{ending}.index.json"))
    if len(pickle_indexes) == 1:
        return _of_index(pickle_indexes[0])
    if len(pickles) == 1:
        return _named_after(folder, _of_file(pickles[0]))
    if pickles:
        raise InputError(f"{folder}: is a folder of several PyTorch files ({_listed(pickles)}); name one")
    raise InputError(f"{folder}: is a folder without a .safetensors file; name a checkpoint")


def _listed(paths: Sequence[Path]) -> str:
    """The names of the first four."""
    return ", ".join([*(printable(path.name) for path in paths[:4]), *(["..."] if len(paths) > 4 else [])])


def _named_after(folder: Path, source: Source) -> Source:
    # Beside the folder: in it, the output would be a second checkpoint.
    stem = Path(os.path.abspath(folder))
    return replace(source, stem=stem) if stem.name else source
