"""PyTorch files: pickles, which can run code; read only where torch's loader of plain weights takes them."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from lrq.checkpoint.header import Entry, lay_out
from lrq.checkpoint.reader import CODES, Reader
from lrq.errors import InputError, printable


class PickleReader(Reader):
    """A ``.bin`` or ``.pt`` file that holds nothing but tensors; they stay on the disk until they are read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            super().__init__(path)
        self.stem = self.path.with_suffix("")
        self._files, self._paths = [], (self.path,)
        self._starts, self._data_starts = [0], [0]
        tensors = _load(self.path)
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        described = [(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in self._tensors.items()]
        self.header, text = lay_out(described, {})
        self.header_sha256 = hashlib.sha256(text).hexdigest()
        self.entries = {entry.name: entry for entry in self.header.entries}
        self._files.append(self.path.open("rb", buffering=0))

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def read_into(self, entry: Entry, begin: int, view: memoryview) -> None:
        if not len(view):
            return
        data = self._tensors[entry.name].contiguous().reshape(-1).view(torch.uint8)
        torch.frombuffer(view, dtype=torch.uint8).copy_(data[begin : begin + len(view)])

    def forget(self, entry: Entry, begin: int, size: int) -> None:
        """Its bytes lie where torch has them."""


def _load(path: Path) -> dict[str, torch.Tensor]:
    refused = f"{path}: a PyTorch file, which can run code when it is loaded"
    try:
        loaded: Any = _load_weights(path)
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise InputError(
            f"{refused}, and torch can't load it as weights only ({printable(reason)}); convert it to .safetensors"
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
    return loaded


def _load_weights(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # Files of torch before 1.6 can't be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)
