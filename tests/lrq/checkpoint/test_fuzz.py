"""Headers, indexes and journals of any bytes: read, or refused in one line; nothing outside the file is read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import by_hand, convert, record, run, save
from lrq.checkpoint.header import BITS
from lrq.checkpoint.journal import _line
from lrq.checkpoint.reader import Reader
from lrq.errors import InputError

FEW = settings(max_examples=100, suppress_health_check=list(HealthCheck), derandomize=True)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
naturals = st.one_of(st.integers(0, 64), st.sampled_from([-1, 1 << 31, 1 << 62, 1 << 63, 1 << 64]))
records = st.one_of(
    anything,
    st.builds(
        record,
        st.sampled_from(["?", *BITS]),
        st.lists(naturals, max_size=4),
        st.lists(naturals, min_size=2, max_size=2),
    ),
)
names = st.text(max_size=12) | st.sampled_from(
    ["__metadata__", "../../etc/passwd", "a\x1b[2J\r\n.weight", "\0", "a.weight"]
)
tables = st.dictionaries(names, records, max_size=4)


def one_line(text: str) -> None:
    assert text.isprintable(), text


def read_all(path: Path) -> None:
    """Read every tensor, or be refused in one line."""
    said = ""
    try:
        with Reader(path) as reader:
            for entry in reader.entries.values():
                assert sum(map(len, reader.chunks(entry))) == entry.size <= reader.size
    except InputError as error:
        said = str(error)
    one_line(said)


@FEW
@given(data=st.binary(max_size=64), table=tables, length=st.none() | naturals.filter(lambda n: 0 <= n < 1 << 64))
def test_headers(data, table, length):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.safetensors")
        for content in (data, by_hand(data, data, length), by_hand(table, data, length)):
            path.write_bytes(content)
            read_all(path)
            result = run("convert", "-i", path, "-o", Path(folder, "out"), "--simple", "--device", "cpu")
            assert result.exit_code in (0, 2) and not (result.exit_code and Path(folder, "out").exists())
            assert result.exception is None or isinstance(result.exception, SystemExit)
            for line in result.stderr.splitlines():
                one_line(line)


@FEW
@given(
    index=st.one_of(
        anything,
        st.builds(
            lambda files, more: {"weight_map": files, **more},
            st.dictionaries(
                names, st.sampled_from(["a.safetensors", "../b", "/etc/passwd", "", ".", "a\0"]) | anything
            ),
            st.just({}) | st.dictionaries(st.just("metadata"), anything),
        ),
    ),
    tail=st.binary(max_size=4),
)
def test_indexes(index, tail):
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, "a.safetensors"), {"a.weight": torch.ones(2, 2)})
        Path(folder, "m.safetensors.index.json").write_bytes(json.dumps(index).encode() + tail)
        read_all(Path(folder, "m.safetensors.index.json"))
        read_all(Path(folder))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, bytes, bytes, bytes]:
    """A source, the partial file and journal of a run that stopped, and the whole output."""
    folder = tmp_path_factory.mktemp("interrupted")
    source = save(folder / "in.safetensors", {f"blocks.{i}.fc.weight": torch.randn(16, 32) for i in range(3)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lrq.checkpoint.writer.Writer._finish",
            lambda self: (self._sync(), (_ for _ in ()).throw(KeyboardInterrupt)),
        )
        run("convert", "-i", source, "-o", folder / "out", "--simple", "--device", "cpu")
    partial = (folder / "out.partial").read_bytes()
    journal = (folder / "out.partial.journal").read_bytes()
    assert journal.count(b"tensor") > 3
    convert(source, folder / "good", "--device", "cpu")
    return source, partial, journal, (folder / "good").read_bytes()


@FEW
@given(lot=st.data())
def test_journals_and_partial_files(interrupted, lot):
    source, partial, journal, good = interrupted
    lines = journal.splitlines(keepends=True)
    forged = st.builds(lambda value: _line({"tensor": value, "crc": 1}), anything) | st.builds(
        lambda name, crc: _line({"tensor": name, "crc": crc}), st.just("blocks.0.fc.weight") | st.text(), anything
    )
    more = lot.draw(st.lists(st.sampled_from(lines) | forged | st.binary(max_size=20), max_size=4))
    begin = lot.draw(st.integers(0, len(lines)))
    cut = lot.draw(st.integers(0, len(partial)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Path(folder, "out.partial.journal").write_bytes(b"".join([*lines[:begin], *more]))
        Path(folder, "out.partial").write_bytes(partial[:cut] if lot.draw(st.booleans()) else partial)
        flags = ("--simple", "--device", "cpu")
        result = run("convert", "-i", source, "-o", folder / "out", *flags)
        assert result.exit_code in (0, 2) and isinstance(result.exception, SystemExit | None), result.exception
        if result.exit_code:
            (line,) = result.stderr.splitlines()
            one_line(line)
            assert not (folder / "out").exists()
            convert(source, folder / "out", "--device", "cpu", "--restart")
        assert (folder / "out").read_bytes() == good
