"""A file that was converted already: what the first run kept because of where it stands, the second keeps too."""

from __future__ import annotations

from checkpoints import load, normal, run, save
from lrq.checkpoint.reader import Reader


def test_what_stands_outside_of_blocks_stays_outside(tmp_path):
    tensors = {f"blocks.{i}.fc.weight": normal(256, 256, seed=i) for i in range(3)} | {"t1.weight": normal(128, 128)}
    source, once, twice = save(tmp_path / "in", tensors), tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    assert run("convert", "-i", source, "-o", once, "--simple").exit_code == 0
    assert "t1" not in load(once).stated
    result = run("convert", "-i", once, "-o", twice, "--nvfp4", "--simple")
    assert result.exit_code != 0 or "t1" not in load(twice).stated
    assert "nvfp4" not in (twice.read_bytes().decode("latin-1") if twice.exists() else "")


def test_the_parts_of_a_file_in_shards_are_named_by_its_index(tmp_path):
    source = save(tmp_path / "in", {f"blocks.{i}.fc.weight": normal(256, 256, seed=i) for i in range(3)})
    output = tmp_path / "out.safetensors"
    assert run("convert", "-i", source, "-o", output, "--simple", "--shard_size", "100kB").exit_code == 0
    result = run("verify", output)
    assert result.exit_code == 2 and "it is in shards: name out.safetensors.index.json" in result.stderr
    with Reader(tmp_path / "out.safetensors.index.json") as reader:
        assert reader.entries
