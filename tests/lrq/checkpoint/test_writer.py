"""A file appears when it is whole; until then, and after any failure, there is nothing."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoints import load, normal, same_bytes, save, transformer
from lrq.checkpoint import disk
from lrq.checkpoint.header import lay_out
from lrq.checkpoint.layout import one_file
from lrq.checkpoint.reader import Reader
from lrq.checkpoint.writer import Writer
from lrq.errors import InputError, UnfinishedError

A, B = normal(3, 5), torch.arange(4, dtype=torch.uint8)
HEADER = lay_out([("b", "U8", (4,)), ("a", "F32", (3, 5)), ("none", "F32", (0, 2))], {"k": "v"})


def write(path: Path) -> None:
    with Writer(one_file(path, *HEADER), {}) as writer:
        writer.write("b", B)
        writer.write("a", A)


def write_half(path: Path, failure: type[BaseException]) -> None:
    with Writer(one_file(path, *HEADER), {}) as writer:
        writer.write("b", B)
        raise failure


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_what_the_library_reads(tmp_path):
    write(tmp_path / "out.safetensors")
    file = load(tmp_path / "out.safetensors")
    assert same_bytes(file.tensors["a"], A) and same_bytes(file.tensors["b"], B)
    assert file.tensors["none"].shape == (0, 2) and file.metadata == {"k": "v"}
    assert names(tmp_path) == ["out.safetensors"]


def test_the_header_is_there_first_beside_the_target_under_another_name(tmp_path):
    target = tmp_path / "out.safetensors"
    with Writer(one_file(target, *HEADER), {}) as writer:
        assert names(tmp_path) == ["out.safetensors.partial", "out.safetensors.partial.journal"]
        partial = tmp_path / "out.safetensors.partial"
        header, data = HEADER
        assert partial.read_bytes() == data + bytes(header.data_size)
        writer.write("a", A)
        assert not target.exists()
        writer.write("b", B)
    assert names(tmp_path) == ["out.safetensors"]


def test_takes_tensors_that_are_not_contiguous(tmp_path):
    with Writer(one_file(tmp_path / "t", *lay_out([("a", "BF16", (5, 3))], {})), {}) as writer:
        writer.write("a", A.bfloat16().mT)
    assert same_bytes(load(tmp_path / "t").tensors["a"], A.bfloat16().mT)


def test_an_existing_file_is_replaced_at_the_end(tmp_path):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    with Writer(one_file(target, *HEADER), {}) as writer:
        writer.write("a", A)
        writer.write("b", B)
        assert target.read_bytes() == b"old"
    assert same_bytes(load(target).tensors["a"], A)


PARTIAL = ["out.safetensors.partial", "out.safetensors.partial.journal"]


@pytest.mark.parametrize("failure", [InputError, UnfinishedError, RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_file_and_what_is_done_unless_the_input_is_bad(tmp_path, failure):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(failure):
        write_half(target, failure)
    kept = [] if failure is InputError else PARTIAL
    assert names(tmp_path) == ["out.safetensors", *kept] and target.read_bytes() == b"old"
    with Writer(one_file(target, *HEADER), {}) as writer:
        assert writer.finished == ({"b"} if kept else set())
        writer.write("a", A)
        if not kept:
            writer.write("b", B)
    assert names(tmp_path) == ["out.safetensors"]
    assert same_bytes(load(target).tensors["a"], A) and same_bytes(load(target).tensors["b"], B)


@pytest.mark.parametrize("failure", [UnfinishedError, KeyboardInterrupt])
def test_where_nothing_is_done_nothing_is_left(tmp_path, failure):
    writer = Writer(one_file(tmp_path / "t", *HEADER), {})

    def fail() -> None:
        with writer:
            writer.write_at("a", 0, memoryview(bytes(9)))
            raise failure

    with pytest.raises(failure):
        fail()
    assert names(tmp_path) == [] and writer.kept() == "nothing was written"


def test_a_tensor_never_written_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="never written: b"), Writer(one_file(tmp_path / "t", *HEADER), {}) as writer:
        writer.write("a", A)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("wrong", [A.mT, A.double(), A[:2]], ids=["shape", "dtype", "rows"])
def test_a_tensor_other_than_planned_is_an_error(tmp_path, wrong):
    with (
        pytest.raises(RuntimeError, match="tensor a: planned"),
        Writer(one_file(tmp_path / "t", *HEADER), {}) as writer,
    ):
        writer.write("a", wrong)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("posix_fallocate", errno.ENOSPC),
        ("fsync", errno.EIO),
    ],
)
def test_a_disk_that_fails_at_the_start_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call, number):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError, match=os.strerror(number)) as caught:
        write(tmp_path / "out.safetensors")
    monkeypatch.undo()
    assert len(str(caught.value).splitlines()) == 1 and str(tmp_path) in str(caught.value)
    assert names(tmp_path) == []


def test_a_folder_that_takes_no_file_is_one_line(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(InputError, match=os.strerror(errno.EROFS)):
        write(tmp_path / "out.safetensors")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_writes_where_space_cannot_be_reserved(tmp_path, monkeypatch):
    def unsupported(*_args):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write(tmp_path / "out.safetensors")
    assert same_bytes(load(tmp_path / "out.safetensors").tensors["a"], A)


@pytest.mark.parametrize("free, fits", [(1 << 30, True), (1, False)])
def test_a_slow_reservation_ends_and_free_space_decides(tmp_path, monkeypatch, free, fits):
    taken = []
    monkeypatch.setattr(disk, "RESERVE_SECONDS", -1.0)
    monkeypatch.setattr(disk, "RESERVE_PIECE", 8)
    monkeypatch.setattr(os, "posix_fallocate", lambda _fd, begin, size: taken.append((begin, size)))
    monkeypatch.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_blocks=9, f_bavail=free, f_bfree=free, f_frsize=1))
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match=r"can't reserve .*No space"):
        write(tmp_path / "out.safetensors")
    assert taken == [(0, 8)]
    if fits:
        assert same_bytes(load(tmp_path / "out.safetensors").tensors["a"], A)
    else:
        assert names(tmp_path) == []


def test_short_writes_go_on(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    write(tmp_path / "out.safetensors")
    assert same_bytes(load(tmp_path / "out.safetensors").tensors["a"], A)


def test_a_name_as_long_as_the_file_system_takes(tmp_path):
    target = tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    write(target)
    assert same_bytes(load(target).tensors["a"], A)


def test_the_file_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "out.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "out.safetensors").stat().st_mode & 0o777 == 0o640


def test_the_reader_gives_every_dtype_back(tmp_path):
    dtypes = (torch.float64, torch.float16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {str(dtype): normal(3, 4).to(dtype) for dtype in dtypes} | {"scalar": torch.tensor(2.5)}
    tensors |= {"empty": torch.empty(0, 3), **transformer()}
    with Reader(save(tmp_path / "all", tensors)) as reader:
        assert reader.size == (tmp_path / "all").stat().st_size
        for name, tensor in tensors.items():
            assert same_bytes(reader.read(name), tensor)


def test_the_reader_reads_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("lrq.checkpoint.reader.CHUNK", 7)
    with Reader(save(tmp_path / "all", {"a": A})) as reader:
        pieces = list(map(bytes, reader.chunks(reader.entries["a"])))
        assert max(map(len, pieces)) == 7 and b"".join(pieces) == A.numpy().tobytes()


def test_a_source_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = save(tmp_path / "shrinks", {"a.weight": A})
    with Reader(path) as reader:
        os.truncate(path, reader.header.data_start + 10)
        with pytest.raises(InputError, match=r"ended inside tensor a\.weight"):
            reader.read("a.weight")
