"""PyTorch files: read by the part from the file itself, whatever their tensors look like, or refused in one line."""

from __future__ import annotations

import contextlib
import os
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from checkpoints import normal, run, same_bytes, transformer
from lrq import quantize
from lrq.checkpoint import disk
from lrq.checkpoint.pickled import PickleReader
from lrq.checkpoint.reader import Reader
from lrq.errors import InputError

BASE = normal(6, 8, 10, seed=3)
VIEWS = {
    "transposed": normal(33, 20).mT,
    "columns": normal(16, 40)[:, 3:17],
    "every other": normal(40)[1::2],
    "permuted": BASE.permute(2, 0, 1),
    "part": BASE[2:4, :, 5:],
    "expanded": normal(1, 7).expand(5, 7),
    "half": normal(9, 6).bfloat16().mT,
    "negated": torch._neg_view(normal(8, 8)),
    "negated and transposed": torch._neg_view(normal(12, 8)).mT,
}
"""Tensors whose bytes don't lie in order in the file."""
PLAIN = {**transformer(), "rows": BASE[3:5], "empty": torch.empty(0, 3), "one": torch.tensor(2.5), "same": BASE}


def pytorch(path: Path, tensors: object, old: bool = False) -> Path:
    torch.save(tensors, path, _use_new_zipfile_serialization=not old)
    return path


def is_read(reader: Reader, tensors: dict[str, torch.Tensor]) -> None:
    assert reader.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        tensor = tensor.resolve_neg()
        assert same_bytes(reader.read(name), tensor), name
        expected = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        entry = reader.entries[name]
        for begin in range(0, entry.size, 61):
            piece = memoryview(bytearray(min(61, entry.size - begin)))
            reader.read_into(entry, begin, piece)
            assert bytes(piece) == expected[begin : begin + 61], name


@pytest.mark.parametrize("old", [False, True])
def test_every_part_of_every_tensor_is_read(tmp_path, old):
    with Reader(pytorch(tmp_path / "m.bin", {**PLAIN, **VIEWS}, old)) as reader:
        is_read(reader, {**PLAIN, **VIEWS})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what is mapped")
def test_nothing_stays_mapped_or_loaded(tmp_path):
    path = pytorch(tmp_path / "m.bin", {**PLAIN, **VIEWS})
    with PickleReader(path) as reader:
        for name in reader.entries:
            reader.read(name)
            assert str(path) not in Path("/proc/self/maps").read_text()
        assert not reader._loaded


def test_the_page_cache_forgets_what_was_read(tmp_path, monkeypatch):
    path = pytorch(tmp_path / "m.bin", {**PLAIN, **VIEWS})
    forgotten = []
    monkeypatch.setattr(disk, "forget", lambda fd, offset, size: forgotten.append((offset, size)))
    with Reader(path) as reader:
        entry = reader.entries["rows"]
        reader.forget(entry, 4, entry.size - 4)
        reader.forget(reader.entries["transposed"], 0, 8)
    ((offset, size),) = forgotten
    assert path.read_bytes()[offset : offset + size] == BASE[3:5].numpy().tobytes()[4:]


@pytest.mark.parametrize("name", ["plain", "view"])
def test_a_file_cut_while_it_is_read_is_one_line(tmp_path, name):
    tensors = {"plain": normal(300, 300), "view": normal(300, 300).mT}
    with Reader(pytorch(tmp_path / "m.bin", tensors)) as reader:
        os.truncate(tmp_path / "m.bin", 5000)
        with pytest.raises(InputError, match="it changed while being read"):
            reader.read(name)


def rewritten(path: Path, kind: str) -> Path:
    """The archive with other records than those that torch would write."""
    out = path.with_name(f"{kind}.bin")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            if kind == "one more first" and info.filename.endswith("data/0"):
                new.writestr(info.filename.replace("data/0", "data/x"), bytes(info.file_size))
            packed = kind == "compressed" and "/data/" in info.filename
            new.writestr(
                zipfile.ZipInfo(info.filename),
                old.read(info),
                compress_type=zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED,
            )
        if kind == "one more":
            new.writestr(f"{old.infolist()[0].filename.partition('/')[0]}/data/x", bytes(64))
    return out


@pytest.mark.parametrize("kind", ["the same", "one more", "one more first"])
def test_records_that_no_tensor_has_do_not_shift_the_others(tmp_path, kind):
    tensors = {str(number): normal(4, 4, seed=number) for number in range(6)}
    with Reader(rewritten(pytorch(tmp_path / "m.bin", tensors), kind)) as reader:
        is_read(reader, tensors)


def test_compressed_records_are_never_taken_for_weights(tmp_path):
    tensors = {"a.weight": torch.zeros(64, 64), "b.weight": normal(64, 64)}
    path = rewritten(pytorch(tmp_path / "m.bin", tensors), "compressed")
    with contextlib.suppress(InputError), Reader(path) as reader:
        is_read(reader, tensors)


@pytest.mark.parametrize("name", ["__metadata__", "\ud800.weight"])
def test_names_that_safetensors_cannot_store_are_refused(tmp_path, name):
    path = pytorch(tmp_path / "m.pt", {"a.weight": normal(32, 32), name: normal(2)})
    for args in (("convert", "-i", path, "--simple"), ("plan", path)):
        result = run(*args)
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and "which safetensors can't store" in line and line.isprintable()
    assert list(tmp_path.iterdir()) == [path]


def test_a_negated_tensor_converts(tmp_path):
    path = pytorch(tmp_path / "m.pt", {"a.weight": torch._neg_view(normal(32, 32)), "b": torch._neg_view(normal(3))})
    with Reader(quantize(path, nvfp4=True, simple=True).output) as reader:
        assert torch.equal(reader.read("b"), -normal(3))


def test_damaged_files_are_read_or_refused(tmp_path):
    path = tmp_path / "m.bin"
    for old in (False, True):
        whole = pytorch(path, {"a.weight": normal(4, 4), "b": torch.tensor(1), "t": normal(4, 4).mT}, old).read_bytes()
        chance = random.Random(old)
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(chance.randint(1, 3)):
                data[chance.randrange(min(len(data), 700))] = chance.randrange(256)
            path.write_bytes(data[: chance.randint(1, len(data))] if chance.random() < 0.1 else data)
            with contextlib.suppress(InputError), Reader(path) as reader:
                for name in reader.entries:
                    reader.read(name)


class Other:
    """No tensor."""


def test_a_refusal_says_torchs_reason_and_no_more(tmp_path):
    path = pytorch(tmp_path / "m.bin", {"a": Other()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            InputError, match=r"\(Unsupported global: GLOBAL .*Other was not an allowed global"
        ) as caught:
            Reader(path)
        (tmp_path / "tar.bin").write_bytes(b"x" * 2000)
        with pytest.raises(InputError, match=r"weights only \(Unsupported operand \d+\); convert"):
            Reader(tmp_path / "tar.bin")
    words = str(caught.value)
    assert words.isprintable() and "[1m" not in words and "x1b" not in words
    assert words.endswith("; convert it to .safetensors")
