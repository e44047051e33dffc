"""An output replaces all of what had its name, and nothing else; its temporary names are no inputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoints import normal, run, save
from lrq.checkpoint.header import lay_out
from lrq.checkpoint.layout import Layout, in_shards, one_file
from lrq.checkpoint.writer import Writer
from lrq.errors import InputError

DESCRIBED = [(f"t{i}", "F32", (64, 4)) for i in range(6)]


@pytest.fixture
def source(tmp_path) -> Path:
    return save(tmp_path / "in.safetensors", {f"blocks.{i}.fc.weight": normal(64, 128, seed=i) for i in range(6)})


def convert(source: Path, output: Path, *flags: str):
    return run("convert", "-i", source, "-o", output, "--simple", *flags)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))


@pytest.mark.parametrize("suffix", ["partial", "partial.journal"])
def test_an_input_with_a_temporary_name_of_the_output_is_refused(tmp_path, source, suffix):
    odd = tmp_path / f"out.safetensors.{suffix}"
    shutil.copy(source, odd)
    for flags in ((), ("--restart",)):
        result = convert(odd, tmp_path / "out.safetensors", *flags)
        assert result.exit_code == 2 and "is an input, and the name of out.safetensors while" in result.stderr
    assert odd.read_bytes() == source.read_bytes()


def test_a_smaller_number_of_files_leaves_none_of_the_old_ones(tmp_path, source):
    output = tmp_path / "out.safetensors"
    foreign = tmp_path / "out-00001-of-00009.safetensors"
    shutil.copy(source, foreign)
    assert convert(source, output, "--shard_size", "20kB").exit_code == 0
    many = names(tmp_path)
    assert len(many) > 4
    assert convert(source, output, "--shard_size", "40kB", "--mxfp8").exit_code == 0
    few = names(tmp_path)
    assert len(few) < len(many) and not set(few) & set(many) - {foreign.name, "out.safetensors.index.json"}
    result = convert(source, output)
    assert "removed, the output was in" in result.stderr
    assert names(tmp_path) == [foreign.name, "out.safetensors"]
    assert convert(source, output, "--shard_size", "40kB").exit_code == 0
    assert "out.safetensors" not in names(tmp_path)


def begin(layout: Layout) -> None:
    """A run that is stopped behind its first tensor."""
    writer = Writer(layout, {"source": 1})
    writer.write_at("t0", 0, memoryview(bytes(1024)))
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_an_unfinished_run_in_another_number_of_files_is_in_the_way_until_restart(tmp_path):
    target = tmp_path / "out.safetensors"
    one = one_file(target, *lay_out(DESCRIBED, {}))
    shards = [in_shards(target, [[tensor] for tensor in DESCRIBED], {}, size) for size in (1300, 3000)]
    for begun, then in ((shards[0], one), (one, shards[0]), (shards[0], shards[1])):
        begin(begun)
        left = set(names(tmp_path))
        with pytest.raises(InputError, match="unfinished run"):
            Writer(then, {"source": 1, "size": 2})
        writer = Writer(then, {"source": 1, "size": 2}, restart=True)
        assert not left & {name for name in names(tmp_path) if "journal" not in name}
        writer.__exit__(InputError, InputError("enough"), None)
        assert not names(tmp_path)


def test_files_are_of_the_size_that_was_asked_for_or_it_is_said(tmp_path, source):
    output = tmp_path / "out.safetensors"
    assert "larger, as one layer" not in convert(source, output, "--shard_size", "30kB").stderr
    shards = sorted(tmp_path.glob("out-*.safetensors"))
    assert len(shards) > 1 and all(path.stat().st_size <= 30_000 for path in shards)
    assert "--shard_size: 6 files larger" in convert(source, output, "--shard_size", "2kB").stderr
