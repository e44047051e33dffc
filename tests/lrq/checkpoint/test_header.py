"""A header is read with suspicion and written to the byte."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from checkpoints import by_hand, normal, record
from lrq.checkpoint.header import BITS, MAX_HEADER, Entry, lay_out, read_header
from lrq.errors import InputError

HERE = Path("model.safetensors")
GOOD = save({"a.weight": normal(4, 4), "b": torch.arange(3)}, {"format": "pt"})


def read(data: bytes):
    return read_header(io.BytesIO(data), HERE)[0]


def test_reads_what_the_library_writes():
    header = read(GOOD)
    assert {entry.name: (entry.dtype, entry.shape) for entry in header.entries} == {
        "a.weight": ("F32", (4, 4)),
        "b": ("I64", (3,)),
    }
    assert header.metadata == {"format": "pt"}
    assert header.data_start + header.data_size == len(GOOD)


def test_reads_a_tensor_at_its_place():
    header = read(GOOD)
    entry = next(entry for entry in header.entries if entry.name == "b")
    assert GOOD[header.data_start :][entry.begin : entry.end] == torch.arange(3).numpy().tobytes()


def test_takes_missing_and_null_metadata():
    for extra in ({}, {"__metadata__": None}):
        assert read(by_hand({**extra, "a": record()}, bytes(64))).metadata == {}


def test_takes_empty_tensors_scalars_and_odd_four_bit_tensors():
    table = {"empty": record(shape=[0, 9], offsets=[0, 0]), "one": record(shape=[], offsets=[0, 4])}
    table["four"] = record("F4", [3, 3], [4, 9])
    assert {entry.name: entry.size for entry in read(by_hand(table, bytes(9))).entries} == {
        "empty": 0,
        "one": 4,
        "four": 5,
    }


LIES = {
    "empty file": (b"", "empty"),
    "shorter than its length": (b"1234567", "not a safetensors file"),
    "text": (b"this is a text, not a checkpoint" * 9, "not a safetensors file"),
    "header length 0": (bytes(80), "header length 0"),
    "header length 2^63": (by_hand(b"{}", length=1 << 63), "not a safetensors file"),
    "header longer than the file": (by_hand(b"{}", length=1000), "not a safetensors file, or truncated"),
    "cut in the header": (GOOD[:30], "truncated"),
    "cut in the data": (GOOD[:-1], "1 bytes are missing"),
    "bytes after the data": (GOOD + b"xx", "2 bytes follow"),
    "no JSON": (by_hand(b"{nope}"), "not valid JSON"),
    "not UTF-8": (by_hand(b'{"\xff": 1}'), "not valid JSON"),
    "an array": (by_hand(b"[]"), "not a JSON object"),
    "deep nesting": (by_hand(b"[" * 100_000), "not valid JSON"),
    "a name twice": (by_hand(b'{"a": 1, "b": 2, "a": 3}'), "duplicate key 'a'"),
    "half a surrogate as name": (by_hand({"\ud800": record()}, bytes(64)), "not valid Unicode"),
    "half a surrogate as metadata": (by_hand({"__metadata__": {"k": "\udc00"}}), "not valid Unicode"),
    "metadata of numbers": (by_hand({"__metadata__": {"k": 1}}), "__metadata__ must map strings to strings"),
    "metadata as array": (by_hand({"__metadata__": ["k"]}), "__metadata__ must map strings to strings"),
    "tensor is a number": (by_hand({"a": 3}), "tensor a: not an object"),
    "no dtype": (by_hand({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "unknown dtype None"),
    "unknown dtype": (by_hand({"a": record("F31")}, bytes(64)), "unknown dtype F31"),
    "dtype is an array": (by_hand({"a": record(["F32"])}, bytes(64)), "unknown dtype"),
    "negative shape": (by_hand({"a": record(shape=[-4, -4])}, bytes(64)), "natural numbers"),
    "fractional shape": (by_hand({"a": record(shape=[4.0, 4])}, bytes(64)), "natural numbers"),
    "boolean shape": (by_hand({"a": record(shape=[True, 16])}, bytes(64)), "natural numbers"),
    "three offsets": (by_hand({"a": record(offsets=[0, 64, 64])}, bytes(64)), "natural numbers"),
    "offsets backwards": (by_hand({"a": record(offsets=[64, 0])}, bytes(64)), "data_offsets give -64"),
    "shape too large": (by_hand({"a": record(shape=[5, 4])}, bytes(64)), "takes 80 bytes, data_offsets give 64"),
    "shape of 300 huge numbers": (by_hand({"a": record(shape=[1 << 62] * 300)}, bytes(64)), "natural numbers"),
    "number of 5000 digits": (by_hand(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"), "not valid JSON"),
    "beyond the file": (by_hand({"a": record(shape=[1 << 40, 4], offsets=[0, 1 << 44])}, bytes(64)), "truncated"),
    "overlap": (by_hand({"a": record(), "b": record(offsets=[32, 96])}, bytes(96)), "tensor b overlaps"),
    "the same place twice": (by_hand({"a": record(), "b": record()}, bytes(64)), "overlaps"),
    "gap": (by_hand({"a": record(), "b": record(offsets=[68, 132])}, bytes(132)), "tensor b leaves a gap"),
    "gap at the start": (by_hand({"a": record(offsets=[8, 72])}, bytes(72)), "tensor a leaves a gap"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_line_that_names_the_file(lie):
    data, words = LIES[lie]
    with pytest.raises(InputError) as caught:
        read(data)
    message = str(caught.value)
    assert message.startswith("model.safetensors: ") and words in message
    assert len(message.splitlines()) == 1 and message.isprintable()


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER + 100)
    with path.open("rb") as file, pytest.raises(InputError, match="over the limit"):
        read_header(file, path)


def test_control_characters_of_a_name_are_escaped():
    with pytest.raises(InputError) as caught:
        read(by_hand({"a\n\x1b[2J": record(shape=[1])}, bytes(64)))
    assert "a\\n\\x1b[2J" in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(InputError):
        read(data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.sampled_from(["F32", "F4", "data_offsets", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner, max_size=2),
    max_leaves=4,
)
RECORDS = st.fixed_dictionaries({"dtype": VALUES, "shape": VALUES, "data_offsets": VALUES}) | VALUES


@given(st.dictionaries(st.sampled_from(["a", "b.weight", "__metadata__"]), RECORDS, max_size=3), st.integers(0, 99))
def test_any_header_is_read_or_refused(table, size):
    try:
        header = read(by_hand(table, bytes(size)))
    except InputError:
        return
    assert sum(entry.size for entry in header.entries) == size


LAYOUTS = st.lists(
    st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 5), max_size=3).map(tuple)), max_size=9
).map(lambda found: [(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(found)])


@given(LAYOUTS)
def test_a_layout_reads_back_without_gaps_and_aligned(tensors):
    header, data = lay_out(tensors, {"k": "v"})
    assert len(data) == header.data_start and header.data_start % 8 == 0
    again = read(data + bytes(header.data_size))
    # Empty tensors share their place with others: their order is not told by offsets.
    assert set(again.entries) == set(header.entries) and again.metadata == {"k": "v"}
    for entry in header.entries:
        assert (header.data_start + entry.begin) % max(BITS[entry.dtype] // 8, 1) == 0


def test_a_layout_keeps_the_order_within_a_dtype_and_puts_wide_dtypes_first():
    header, _ = lay_out([("a", "U8", (3,)), ("b", "F32", (1,)), ("c", "U8", (1,)), ("d", "F32", (2,))], {})
    assert [entry.name for entry in header.entries] == ["b", "d", "a", "c"]


def test_the_library_reads_a_layout():
    header, data = lay_out([("ä\n", "U8", (3,)), ("b", "BF16", (2, 2))], {"note": "größe"})
    tensors = load(data + bytes(range(header.data_size)))
    assert tensors["ä\n"].tolist() == [8, 9, 10]
    assert tensors["b"].dtype == torch.bfloat16 and tensors["b"].shape == (2, 2)
    assert json.loads(data[8:])["__metadata__"] == {"note": "größe"}


def test_an_entry_knows_its_size():
    assert Entry("a", "U8", (3,), 5, 8).size == 3
