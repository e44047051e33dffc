"""Whatever a journal says, a run ends with the right bytes or is refused in one line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_journal import TENSORS, layout, whole, write

from lrq.checkpoint.checksum import crc32
from lrq.checkpoint.writer import Writer
from lrq.errors import InputError

JOURNAL = "out.safetensors.partial.journal"
PARTIAL = "out.safetensors.partial"

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=5), some, max_size=3),
    max_leaves=5,
)
records = st.fixed_dictionaries(
    {},
    optional={
        "tensor": st.sampled_from([*TENSORS, "other", "\x1b[2J", "../up"]) | values,
        "crc": st.integers(0, 2**32 - 1) | values,
        "whole": values,
        "fingerprint": values,
    },
)


def line(record: object) -> bytes:
    text = json.dumps(record).encode()
    return b"%08x %s\n" % (crc32(text), text)


def goes_on_or_is_refused(folder: Path) -> None:
    refused = ""
    try:
        write(folder)
    except InputError as error:
        refused = str(error)
    assert "\n" not in refused and "\x1b" not in refused
    if refused:
        assert write(folder, restart=True) == set()
    assert whole(folder)


@settings(max_examples=80)
@given(st.lists(records, max_size=6), st.booleans())
def test_lines_with_true_checksums_that_say_anything(lines, starts_well):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, 3)
        good = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
        (folder / JOURNAL).write_bytes(b"".join(good[: 2 * starts_well]) + b"".join(map(line, lines)))
        goes_on_or_is_refused(folder)


@settings(max_examples=80)
@given(st.data())
def test_bytes_changed_anywhere(data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, 4)
        file = folder / data.draw(st.sampled_from([JOURNAL, PARTIAL]))
        content = bytearray(file.read_bytes())
        begin = data.draw(st.integers(0, len(content)))
        content[begin : begin + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
        file.write_bytes(content)
        goes_on_or_is_refused(folder)


@pytest.mark.parametrize("name", [JOURNAL, PARTIAL])
def test_a_link_does_not_lead_the_writer_elsewhere(tmp_path, name):
    (tmp_path / "there").mkdir()
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "there" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(InputError):
        Writer(layout(tmp_path / "there"), {"source": 1})
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_failure_in_the_last_step_says_that_all_is_kept(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    def write_all() -> None:
        with writer:
            for name, tensor in TENSORS.items():
                writer.write(name, tensor)

    writer = Writer(layout(tmp_path), {"source": 1})
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(InputError, match="Input/output error"):
            write_all()
    assert "6 of 6 tensors are kept in" in writer.kept()
    assert write(tmp_path) == set(TENSORS) and whole(tmp_path)
