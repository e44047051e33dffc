"""PyTorch files: pickles, which can run code; read only where torch's loader of plain weights takes them."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrq.checkpoint.header import METADATA, Entry, is_unicode, lay_out
from lrq.checkpoint.reader import CODES, TORCH_DTYPES, Reader
from lrq.errors import InputError, printable, unstyled

_LOCAL_HEADER = 30
"""Bytes of a zip entry before its name; the last four are the lengths of the name and of what follows it."""
_REASON = re.compile(
    r"Weights only load failed.*?(?:WeightsUnpickler error:|\n\n)\s*([^\n]+?)\.?(?: Please use |\n|$)", re.DOTALL
)
"""What torch says went wrong, among its advice."""


class _View(NamedTuple):
    """A tensor whose elements don't lie in order in the file."""

    offset: int
    """Of its first element, in the file."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    negated: bool

    @property
    def span(self) -> int:
        """Elements from its first to its last in the file."""
        return 1 + sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))


class PickleReader(Reader):
    """A ``.bin`` or ``.pt`` file that holds nothing but tensors; they stay on the disk until they are read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        source = self._source
        self.path, self.stem = source.files[0], source.stem
        self._paths = source.files
        self._files, self._starts, self._data_starts = [], [0], [0]
        try:
            self._files.append(self.path.open("rb", buffering=0))
        except OSError as error:
            raise InputError(f"{self.path}: can't be opened: {error.strerror}") from None
        try:
            self._take(*_load(self.path))
        except BaseException:
            self._close()
            raise
        self.entries = {entry.name: entry for entry in self.header.entries}

    def _take(self, tensors: dict[str, torch.Tensor], addresses: dict[int, int]) -> None:
        described = [(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
        self.header, text = lay_out(described, {})
        self.header_sha256 = hashlib.sha256(text).hexdigest()
        self._offsets: dict[str, int] = {}
        self._views: dict[str, _View] = {}
        self._loaded: dict[str, torch.Tensor] = {}
        starts = _places(self.path, addresses)
        for name, tensor in tensors.items():
            start = 0 if not tensor.numel() else starts.get(tensor.untyped_storage().data_ptr())
            if start is None:
                self._loaded[name] = tensor.detach()
                continue
            offset = start + int(tensor.storage_offset()) * tensor.element_size()
            if tensor.is_contiguous() and not tensor.is_neg():
                self._offsets[name] = offset
            else:
                self._views[name] = _View(offset, tuple(tensor.shape), tensor.stride(), tensor.is_neg())

    def read_into(self, entry: Entry, begin: int, view: memoryview) -> None:
        if not len(view) or entry.name in self._offsets:
            super().read_into(entry, begin, view)
            return
        tensor = self._loaded.get(entry.name)
        if tensor is None:
            tensor = self._mapped(entry)
        width = tensor.element_size()
        first, last = begin // width, -(-(begin + len(view)) // width)
        data = _elements(tensor, first, last).resolve_neg().contiguous().view(torch.uint8)
        begin -= first * width
        torch.frombuffer(view, dtype=torch.uint8).copy_(data[begin : begin + len(view)])

    def _mapped(self, entry: Entry) -> torch.Tensor:
        """A view of the file; with it goes its mapping, and so what was read of it leaves the memory."""
        place, dtype = self._views[entry.name], TORCH_DTYPES[entry.dtype]
        start = place.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = place.offset - start + place.span * dtype.itemsize
        if os.fstat(self._files[0].fileno()).st_size < start + length:
            raise InputError(f"{self.path}: ended inside tensor {printable(entry.name)}; it changed while being read")
        # Copied on write: torch has no tensors that can't be written to.
        mapping = mmap.mmap(self._files[0].fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        flat = torch.frombuffer(mapping, dtype=dtype, offset=place.offset - start, count=place.span)
        tensor = flat.as_strided(place.shape, place.stride)
        return torch._neg_view(tensor) if place.negated else tensor

    def forget(self, entry: Entry, begin: int, size: int) -> None:
        if entry.name in self._offsets:
            super().forget(entry, begin, size)

    def _place(self, entry: Entry, begin: int) -> tuple[int, int]:
        return 0, self._offsets.get(entry.name, 0) + begin


def _elements(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Elements ``first`` to ``last`` in the order of the indices; no others are copied."""
    if tensor.dim() <= 1 or tensor.is_contiguous():
        return tensor.reshape(-1)[first:last]
    row = tensor[0].numel()
    top, bottom = -(-first // row), last // row
    if top > bottom:
        return _elements(tensor[bottom], first - bottom * row, last - bottom * row)
    parts = [tensor[top:bottom].reshape(-1)]
    if first < top * row:
        parts.insert(0, _elements(tensor[top - 1], first - (top - 1) * row, row))
    if last > bottom * row:
        parts.append(_elements(tensor[bottom], 0, last - bottom * row))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _places(path: Path, addresses: dict[int, int]) -> dict[int, int]:
    """Where in the file the storages lie that torch has at these addresses; empty where that is not certain.

    torch maps the file as a whole: records and storages, in order, are equally far from each other.
    """
    try:
        records = _records(path)
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile):
        # An old or damaged archive, which torch has read all the same.
        return {}
    if len(records) != len(addresses) or not records:
        return {}
    pairs = list(zip(sorted(addresses), sorted(records), strict=True))
    distance = pairs[0][0] - pairs[0][1]
    same = all(address - offset == distance and addresses[address] == records[offset] for address, offset in pairs)
    return dict(pairs) if same else {}


def _records(path: Path) -> dict[int, int]:
    """Offset and size of the data of every storage in a zip archive; empty if they are not as torch reads them."""
    found: dict[int, int] = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            folder, _, name = info.filename.partition("/")
            if name == "byteorder" and archive.read(info) != sys.byteorder.encode():
                return {}
            if not folder or not name.startswith("data/") or not info.file_size:
                continue
            if info.compress_type != zipfile.ZIP_STORED:
                return {}
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
            lengths = int.from_bytes(header[-4:-2], "little") + int.from_bytes(header[-2:], "little")
            found[info.header_offset + _LOCAL_HEADER + lengths] = info.file_size
    return found


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[int, int]]:
    """The tensors, and the bytes of all storages by address."""
    refused = f"{path}: a PyTorch file, which can run code when it is loaded"
    addresses: dict[int, int] = {}
    try:
        loaded: Any = _load_weights(path, addresses)
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from None
    except MemoryError:
        raise
    except Exception as error:
        # torch's loader alone ran, over a file that may be damaged anywhere: no list of its errors would be whole.
        raise InputError(
            f"{refused}, and torch can't load it as weights only ({_reason(error)}); convert it to .safetensors"
        ) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        raise InputError(f"{refused}; it holds no tensors by name; convert it to .safetensors")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.dtype not in CODES:
            raise InputError(f"{refused}; its entry {printable(str(name))} is no tensor; convert it to .safetensors")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(f"{refused}; its tensor {printable(name)} is not dense; convert it to .safetensors")
        if name == METADATA or not is_unicode(name):
            raise InputError(f"{path}: a tensor is named {printable(name)}, which safetensors can't store; rename it")
    return loaded, addresses


def _load_weights(path: Path, addresses: dict[int, int]) -> Any:
    def on_cpu(storage: Any, _: str) -> Any:
        if storage.nbytes():
            addresses[storage.data_ptr()] = storage.nbytes()
        return storage

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location=on_cpu, weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            addresses.clear()
            # Files of torch before 1.6 can't be mapped.
            return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """What torch says, in few words."""
    text = unstyled(str(error)) or type(error).__name__
    found = _REASON.search(text)
    return printable(textwrap.shorten(found[1] if found else text.partition("\n")[0], 160, placeholder=" ..."))
