"""One file, shards, a folder, a glob, a PyTorch file: each is one checkpoint, or refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import load, normal, run, same_bytes, save, transformer
from lrq import quantize, verify
from lrq.checkpoint.reader import Reader
from lrq.checkpoint.sources import expand
from lrq.errors import InputError

FLAGS = {"nvfp4": True, "simple": True}


def shards(folder: Path, stem: str = "model", index: bool = True) -> Path:
    """The transformer in three files; the name of the index."""
    folder.mkdir(exist_ok=True, parents=True)
    tensors = list(transformer().items())
    places = {}
    for number in range(3):
        name = f"{stem}-{number + 1:05}-of-00003.safetensors"
        part = dict(tensors[number::3])
        save(folder / name, part, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    path = folder / f"{stem}.safetensors.index.json"
    if index:
        path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


def same(path: Path) -> bool:
    with Reader(path) as reader:
        expected = transformer()
        assert reader.entries.keys() == expected.keys()
        return all(same_bytes(reader.read(name), tensor) for name, tensor in expected.items())


def whole(tmp_path: Path) -> dict[str, torch.Tensor]:
    (tmp_path / "one").mkdir()
    quantize(save(tmp_path / "one" / "m.safetensors", transformer()), tmp_path / "one" / "out", **FLAGS)
    return load(tmp_path / "one" / "out").tensors


def test_shards_are_read_as_one_file(tmp_path):
    index = shards(tmp_path / "a")
    assert same(index) and same(tmp_path / "a") and same(tmp_path / "a" / "model-*.safetensors")
    shards(tmp_path / "b", index=False)
    assert same(tmp_path / "b")
    pipeline = tmp_path / "flux"
    shards(pipeline / "transformer", "diffusion_pytorch_model")
    save(pipeline / "vae.safetensors", {"v": normal(3)})
    (pipeline / "vae.safetensors").rename(pipeline / "vae.st")
    (pipeline / "model_index.json").write_text("{}")
    assert same(pipeline)
    (tmp_path / "c").mkdir()
    save(tmp_path / "c" / "x.safetensors", transformer())
    assert same(tmp_path / "c")


@pytest.mark.parametrize("source", ["model.safetensors.index.json", ".", "model-*.safetensors"])
def test_shards_convert_to_the_tensors_of_one_file(tmp_path, source):
    folder = tmp_path / "shards"
    shards(folder)
    output = quantize(folder / source, **FLAGS).output
    assert output == (tmp_path / "shards-nvfp4.safetensors" if source == "." else folder / "model-nvfp4.safetensors")
    expected = whole(tmp_path)
    assert load(output).tensors.keys() == expected.keys()
    assert all(same_bytes(tensor, expected[name]) for name, tensor in load(output).tensors.items())
    assert verify(output, folder / "model.safetensors.index.json").ok


def test_an_output_of_shards_verifies_and_is_a_source(tmp_path):
    source = shards(tmp_path / "shards")
    result = run(
        "convert", "-i", source, "-o", tmp_path / "out.safetensors", "--nvfp4", "--simple", "--shard-size", "5kB"
    )
    assert result.exit_code == 0, result.output
    index = tmp_path / "out.safetensors.index.json"
    found = json.loads(index.read_text())["weight_map"]
    expected = whole(tmp_path)
    assert found.keys() == expected.keys() and len(set(found.values())) > 1
    for name, file in found.items():
        assert same_bytes(load(tmp_path / file).tensors[name], expected[name])
    assert run("verify", index, "--source", source).exit_code == 0
    sizes = [path.stat().st_size for path in tmp_path.glob("out-*.safetensors")]
    assert max(sizes) < 5000 + 4500
    for layer in ("blocks.0.attn.qkv", "blocks.1.mlp.fc"):
        assert len({file for name, file in found.items() if name.startswith(f"{layer}.weight")}) == 1


def change(index: Path, places: object) -> None:
    index.write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "C:\\x.safetensors",
        "..\\x.safetensors",
        "\\\\host\\x.safetensors",
        "",
        "x\x00.safetensors",
    ],
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, name):
    save(tmp_path / "x.safetensors", transformer())
    index = shards(tmp_path / "a")
    change(index, {"a.weight": name})
    with pytest.raises(InputError, match="which is not in its folder") as caught:
        Reader(index)
    assert str(caught.value).isprintable()


BAD = {
    "no JSON": ("{nope", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "a list": ("[]", "no weight_map"),
    "no map": ("{}", "no weight_map"),
    "numbers": ('{"weight_map": {"a": 1}}', "no weight_map"),
    "a pickle": ('{"weight_map": {"a": "model.bin"}}', "is not a .safetensors file"),
    "PyTorch": ('{"weight_map": {"a": "model.bin"}}', "can run code when it is loaded; save the shards as"),
    "a surrogate": ('{"weight_map": {"a": "\\ud800.safetensors"}}', "not valid Unicode"),
    "missing": ('{"weight_map": {"a": "gone.safetensors"}}', "can't be opened"),
    "elsewhere": ('{"weight_map": {"a\\u001b": "model-00001-of-00003.safetensors"}}', r"tensor a\x1b is not in"),
    "a folder": ('{"weight_map": {"a": "folder.safetensors"}}', "which is not a file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_index_is_one_line(tmp_path, name):
    text, words = BAD[name]
    index = shards(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    index.write_text(text)
    for args in (("convert", "-i", index, "--simple"), ("plan", index)):
        result = run(*args)
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and words in line and line.isprintable()


def test_tensors_twice_or_unnamed_are_refused(tmp_path):
    index = shards(tmp_path)
    places = json.loads(index.read_text())["weight_map"]
    change(index, {name: file for name, file in places.items() if name != "pos"})
    with pytest.raises(InputError, match=r"tensor pos of .* is missing from the index"):
        Reader(index)
    save(tmp_path / "model-00003-of-00003.safetensors", transformer())
    with pytest.raises(InputError, match=r"is also in model-0000[12]"):
        Reader(index)


def test_folders_that_hold_none_or_several_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"a folder without a \.safetensors file"):
        Reader(tmp_path)
    for name in "ab":
        save(tmp_path / f"{name}.safetensors", {"x": normal(2)})
    with pytest.raises(InputError, match=r"several checkpoints \(a\.safetensors, b\.safetensors"):
        Reader(tmp_path)
    with pytest.raises(InputError, match="finds 2 checkpoints"):
        Reader(tmp_path / "*.safetensors")


def test_a_list_of_four_checkpoints_is_whole(tmp_path):
    for name in "abcd":
        save(tmp_path / f"{name}.safetensors", {"x": normal(2)})
    with pytest.raises(InputError, match=r"\(a\.safetensors, .*, d\.safetensors\); name one"):
        Reader(tmp_path)
    save(tmp_path / "e.safetensors", {"x": normal(2)})
    with pytest.raises(InputError, match=r"d\.safetensors, \.\.\.\); name one"):
        Reader(tmp_path)


def test_a_folder_of_one_pytorch_file_is_that_file(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(transformer(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    assert same(folder)
    assert quantize(folder, **FLAGS).output == tmp_path / "model-nvfp4.safetensors"
    torch.save({}, folder / "optimizer.pt")
    with pytest.raises(InputError, match=r"several PyTorch files \(optimizer\.pt, pytorch_model\.bin\); name one"):
        Reader(folder)
    change(folder / "pytorch_model.bin.index.json", {"a": "pytorch_model.bin"})
    with pytest.raises(InputError, match="can run code when it is loaded"):
        Reader(folder)
    save(folder / "model.safetensors", transformer())
    assert same(folder)


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + ".safetensors", "n" * 300 + ".bin"])
def test_a_name_too_long_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="can't be opened: File name too long"):
        Reader(tmp_path / name)


def test_a_glob_of_incomplete_shards_is_many_files(tmp_path):
    shards(tmp_path, index=False)
    assert len(expand([f"{tmp_path}/model-*.safetensors"])) == 1
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert len(expand([f"{tmp_path}/model-*.safetensors"])) == 2


def test_many_inputs_go_on_after_an_error(tmp_path):
    for name in "ab":
        save(tmp_path / f"{name}.safetensors", transformer())
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    (tmp_path / "to").mkdir()
    inputs = ("-i", tmp_path / "[ab].safetensors", "-i", tmp_path / "broken.safetensors", "-i", tmp_path / "gone")
    result = run("convert", *inputs, "-o", tmp_path / "to", "--simple")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["a-fp8.safetensors", "b-fp8.safetensors"]
    last = result.stderr.splitlines()[-1]
    assert last.startswith("2 of 4 inputs converted; failed: ") and "broken" in last and "gone" in last
    assert run("convert", *inputs[:2], "-o", tmp_path / "to", "--simple").exit_code == 0


def test_many_inputs_do_not_overwrite_each_other(tmp_path):
    for folder in ("x", "y", "to"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "m.safetensors", transformer())
    inputs = ("-i", tmp_path / "x" / "m.safetensors", "-i", tmp_path / "y" / "m.safetensors")
    result = run("convert", *inputs, "-o", tmp_path / "to", "--simple")
    assert result.exit_code == 2 and "its output would be named as that of" in result.stderr
    assert run("convert", *inputs, "-o", tmp_path / "nowhere", "--simple").exit_code == 2
    assert run("convert", *inputs, "--simple").exit_code == 0


@pytest.mark.parametrize("kind", ["plain", "state_dict", "old"])
def test_a_pytorch_file_of_plain_weights_is_read(tmp_path, kind):
    path = tmp_path / "model.pt"
    tensors = {**transformer(), "t": normal(6, 4).mT, "empty": torch.empty(0, 2), "one": torch.tensor(2.5)}
    content = {"state_dict": tensors} if kind == "state_dict" else tensors
    torch.save(content, path, _use_new_zipfile_serialization=kind != "old")
    with Reader(path) as reader:
        assert reader.entries.keys() == tensors.keys()
        assert all(same_bytes(reader.read(name), tensor) for name, tensor in tensors.items())
    summary = quantize(path, **FLAGS)
    assert summary.output.name == "model-nvfp4.safetensors"
    assert verify(summary.output, path).ok


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pytorch_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    contents = {
        "code": {"a": Bomb()},
        "list": [normal(2)],
        "number": {"a": 3},
        "sparse": {"a": normal(3, 3).to_sparse()},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.bin")
    (tmp_path / "text.bin").write_text("no pickle")
    for name in (*contents, "text"):
        result = run("convert", "-i", tmp_path / f"{name}.bin", "--simple")
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and "a PyTorch file, which can run code" in line and ".safetensors" in line
    assert not (tmp_path / "exploded").exists()


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=8) | st.sampled_from(["../a.safetensors", "model.safetensors", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60)
    | JSON.map(lambda v: json.dumps({"weight_map": v}).encode())
    | JSON.map(lambda v: json.dumps(v).encode())
)
def test_any_index_is_read_or_refused(tmp_path, data):
    path = tmp_path / "any.safetensors.index.json"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught, Reader(path):
        pass
    assert str(caught.value).isprintable()


def test_sizes_of_shards():
    for text in ("0", "-1", "many", "5 XB", "1e9", "9" * 400, "nan"):
        assert "--shard_size" in run("convert", "-i", "x", "--shard_size", text).stderr
