"""An unfinished run goes on where it stopped, or says why it can't; two runs never write one output."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from checkpoints import load, normal, same_bytes
from lrq.checkpoint.checksum import combine, crc32
from lrq.checkpoint.header import lay_out
from lrq.checkpoint.layout import in_shards, one_file, partial_of
from lrq.checkpoint.reader import Reader
from lrq.checkpoint.writer import Writer
from lrq.errors import InputError, UnfinishedError

TENSORS = {f"t{i}": normal(64, i + 1, seed=i) for i in range(6)}
DESCRIBED = [(name, "F32", tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def layout(folder: Path, shards: bool = False):
    target = folder / "out.safetensors"
    return (
        in_shards(target, [[one] for one in DESCRIBED], {}, 1000)
        if shards
        else one_file(target, *lay_out(DESCRIBED, {}))
    )


def write(
    folder: Path, count: int = 6, shards: bool = False, fingerprint=None, restart: bool = False
) -> frozenset[str]:
    """Write tensors up to a number and stop there, unless that is all; what earlier runs had finished."""
    writer = Writer(layout(folder, shards), fingerprint or {"source": 1}, restart)
    try:
        with writer:
            for name in [name for name in TENSORS if name not in writer.finished][: count - len(writer.finished)]:
                writer.write(name, TENSORS[name])
            if count < 6:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    return writer.finished


def whole(folder: Path, shards: bool = False) -> bool:
    files = sorted(path.name for path in folder.iterdir())
    assert not [name for name in files if "partial" in name]
    with Reader(folder / ("out.safetensors.index.json" if shards else "out.safetensors")) as reader:
        return all(same_bytes(reader.read(name), tensor) for name, tensor in TENSORS.items())


def test_the_checksum_of_parts_is_that_of_the_whole():
    data = bytes(range(256)) * 9
    for cut in (0, 1, 100, 2303, 2304):
        assert combine(crc32(data[:cut]), crc32(data[cut:]), len(data) - cut) == crc32(data)


@pytest.mark.parametrize("shards", [False, True])
def test_a_run_goes_on_at_the_first_missing_tensor(tmp_path, shards):
    assert write(tmp_path, 2, shards) == set()
    assert write(tmp_path, 4, shards) == {"t0", "t1"}
    assert write(tmp_path, 6, shards) == {"t0", "t1", "t2", "t3"}
    assert whole(tmp_path, shards)


def test_parts_in_any_order_are_checked_on_resume(tmp_path):
    data = memoryview(TENSORS["t5"].numpy()).cast("B")

    def write_some(writer: Writer) -> None:
        with writer:
            for begin, end in ((500, 1000), (0, 500), (1000, len(data))):
                writer.write_at("t5", begin, data[begin:end])

    with pytest.raises(RuntimeError, match="never written"):
        write_some(Writer(layout(tmp_path), {"source": 1}))
    assert write(tmp_path) == {"t5"} and whole(tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"the source's size": 5}, {"the source's size": 7}, "the source's size was 5, is 7"),
        ({"--nvfp4": True}, {"--nvfp4": False}, "--nvfp4 was true, is false"),
        ({"a": "x" * 99}, {"a": 1}, "a was"),
        ({"gone": 1}, {}, "gone was 1, is null"),
    ],
)
def test_another_source_setting_or_version_is_refused_with_the_reason(tmp_path, before, now, words):
    write(tmp_path, 2, fingerprint={**before, "x": 1})
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="--restart begins again") as caught:
        Writer(layout(tmp_path), {**now, "x": 1})
    assert words in str(caught.value) and len(str(caught.value)) < 400
    assert kept == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert write(tmp_path, fingerprint={**now, "x": 1}, restart=True) == set()
    assert whole(tmp_path)


def test_bytes_that_changed_since_are_refused(tmp_path):
    write(tmp_path, 4)
    partial = tmp_path / "out.safetensors.partial"
    data = bytearray(partial.read_bytes())
    for place, words in ((len(data) - 1, None), (3, "is not what was written"), (200 + 8 * 64, "tensor t")):
        changed = bytearray(data)
        changed[place] ^= 1
        partial.write_bytes(changed)
        if words:
            with pytest.raises(InputError, match=words):
                Writer(layout(tmp_path), {"source": 1})
    partial.write_bytes(data[:-1])
    with pytest.raises(InputError, match="is not what was written"):
        Writer(layout(tmp_path), {"source": 1})
    partial.unlink()
    assert write(tmp_path) == set() and whole(tmp_path)


@pytest.mark.parametrize("damage", ["torn", "garbage", "flipped", "empty"])
def test_of_a_damaged_journal_the_whole_lines_before_count(tmp_path, damage):
    write(tmp_path, 3)
    journal = tmp_path / "out.safetensors.partial.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    changed = {"torn": lines[-1][:-5], "garbage": b"\0" * 50 + b"\n", "flipped": b"1" + lines[-1], "empty": b""}[damage]
    journal.write_bytes(b"".join(lines[:3]) + changed)
    assert write(tmp_path, 5) == {"t0", "t1"}
    assert write(tmp_path) == {f"t{i}" for i in range(5)} and whole(tmp_path)


def test_a_partial_file_of_someone_else_is_not_overwritten(tmp_path):
    (tmp_path / "out.safetensors.partial").write_bytes(b"precious")
    with pytest.raises(InputError, match="no journal says what it holds"):
        Writer(layout(tmp_path), {"source": 1})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"precious"]
    assert write(tmp_path, restart=True) == set() and whole(tmp_path)


def test_a_second_run_on_one_target_is_refused_and_the_first_goes_on(tmp_path):
    with Writer(layout(tmp_path), {"source": 1}) as writer:
        for restart in (False, True):
            with pytest.raises(InputError, match="another run is writing this output"):
                Writer(layout(tmp_path), {"source": 1}, restart)
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    assert whole(tmp_path)


def test_the_lock_ends_with_its_process(tmp_path):
    child = os.fork()
    if not child:
        Writer(layout(tmp_path), {"source": 1})
        os._exit(0)
    os.waitpid(child, 0)
    assert partial_of(tmp_path / "out.safetensors").exists()
    assert write(tmp_path) == set() and whole(tmp_path)


def test_data_is_synced_before_the_line_that_vouches_for_it_and_the_name_comes_last(tmp_path, monkeypatch):
    order = []
    for call in ("fsync", "fdatasync", "pwrite", "replace"):
        real = getattr(os, call)

        def note(*args, call=call, real=real):
            if call == "replace":
                order.append((call, Path(args[1]).name))
            else:
                place = os.readlink(f"/proc/self/fd/{args[0]}").rpartition(".")[2]
                order.append(("sync" if "sync" in call else call, place))
            return real(*args)

        monkeypatch.setattr(os, call, note)
    monkeypatch.setattr("lrq.checkpoint.writer.SYNC_BYTES", 1)
    write(tmp_path)
    monkeypatch.undo()
    vouch = [("sync", "partial"), ("pwrite", "journal"), ("sync", "journal")]
    assert order.count(vouch[1]) == 7
    for i, step in enumerate(order):
        if step == vouch[1] and i > 2:
            assert order[i - 1 : i + 2] == vouch
    last = order.index(("replace", "out.safetensors"))
    assert order[last - 1] == ("sync", "partial") and order[last + 1][0] == "sync"


def test_after_a_failed_sync_nothing_more_is_vouched_for(tmp_path, monkeypatch):
    monkeypatch.setattr("lrq.checkpoint.writer.SYNC_BYTES", 1)
    calls = []

    def fail_once(fd):
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("lrq.checkpoint.disk.sync_data", fail_once)
    with pytest.raises(UnfinishedError, match="Input/output error"):
        write(tmp_path)
    monkeypatch.undo()
    assert len(calls) == 2
    assert write(tmp_path) == {"t0"} and whole(tmp_path)


def test_many_syncs_are_one(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("lrq.checkpoint.disk.sync_data", calls.append)
    write(tmp_path)
    assert len(calls) == 1


def test_shards_replace_an_older_output_and_the_index_comes_last(tmp_path, monkeypatch):
    write(tmp_path, shards=True)
    seen = []
    real = os.replace

    def replace(source, target):
        seen.append((Path(target).name, (tmp_path / "out.safetensors.index.json").exists()))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path, shards=True)
    assert [there for _, there in seen] == [False] * len(seen)
    assert seen[-1][0] == "out.safetensors.index.json" and whole(tmp_path, True)


def test_a_crash_between_the_renames_of_shards(tmp_path, monkeypatch):
    """Every rename in turn is the last thing that happens."""
    real = os.replace
    for number in range(1, 9):
        folder = tmp_path / str(number)
        folder.mkdir()
        left = [number]

        def replace(source, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "crash")
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            write(folder, shards=True)
        except UnfinishedError:
            assert not (folder / "out.safetensors.index.json").exists()
            monkeypatch.undo()
            write(folder, shards=True)
        monkeypatch.undo()
        assert whole(folder, True)


def test_an_output_longer_than_a_shard_is_one_file_where_all_fits(tmp_path):
    assert in_shards(tmp_path / "a.safetensors", [[one] for one in DESCRIBED], {}, 1 << 20).index is None
    made = in_shards(tmp_path / "a.safetensors", [[one] for one in DESCRIBED], {"k": "v"}, 1400)
    assert all(file.size <= 1400 or len(file.header.entries) == 1 for file in made.files)
    assert [file.path.name for file in made.files][:2] == [
        "a-00001-of-00005.safetensors",
        "a-00002-of-00005.safetensors",
    ]
    assert made.target.name == "a.safetensors.index.json"
    assert all(file.header.metadata == {"k": "v"} for file in made.files)


def test_a_sharded_output_loads_with_the_library(tmp_path):
    write(tmp_path, shards=True)
    found: dict[str, torch.Tensor] = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= load(path).tensors
    assert all(same_bytes(found[name], tensor) for name, tensor in TENSORS.items())
