"""Whatever a user gets wrong: one line on stderr, exit code 2, no traceback, no file left."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import lrq
import lrq.pipeline
import lrq_kernels
from checkpoints import by_hand, load, normal, process, record, run, save, transformer
from lrq.errors import InputError

GOOD = {"blocks.0.fc.weight": normal(32, 64), "blocks.0.fc.bias": normal(32)}


@pytest.fixture
def source(tmp_path) -> Path:
    return save(tmp_path / "in.safetensors", GOOD)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(result: Result) -> str:
    """The one line."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and line.isprintable()
    return line


def refuse(folder: Path, *args: object) -> str:
    before = everything(folder)
    line = refused(run("convert", *args))
    assert everything(folder) == before
    return line


@pytest.mark.parametrize("args", [("nosuchcommand",), ("--bogus",), ("convert", "--bogus"), ("convert",), ("verify",)])
def test_usage_errors_are_one_line(args):
    assert refused(run(*args)).endswith("; see --help")


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "the file is empty"),
    "zip": (lambda: b"PK\x03\x04\x00\x00\x08\x08" + bytes(99), "a PyTorch or zip archive"),
    "pickle": (lambda: b"\x80\x02\x8a\nl\xfc\x9cF" + bytes(999), "a Python pickle, which can run code"),
    "pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
        "a pointer of Git LFS",
    ),
    "page": (lambda: b"<!DOCTYPE html>\n<html><body>404</body></html>", "HTML or XML"),
    "GGUF": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file"),
    "index": (lambda: b'{"metadata": {}}', "name the shards it lists"),
    "text": (lambda: b"just some text\n" * 20, "not a safetensors file"),
    "header that lies": (lambda: by_hand({"a.weight": record(shape=[9, 9])}, bytes(64)), "takes 324 bytes"),
    "overlap": (lambda: by_hand({"a": record(), "b": record(offsets=[8, 72])}, bytes(72)), "overlaps"),
    "huge header": (lambda: by_hand(b"{}", length=1 << 62), "not a safetensors file"),
    "no tensor": (lambda: by_hand({}), "no layer can be quantized (it holds no 2-D *.weight tensor)"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint(tmp_path, name):
    make, words = FILES[name]
    path = tmp_path / "in.safetensors"
    path.write_bytes(make())
    line = refuse(tmp_path, "-i", path)
    assert words in line and str(path) in line
    if name != "no tensor":
        assert words in refused(run("verify", path))


def test_a_truncated_file(tmp_path, source):
    os.truncate(source, source.stat().st_size - 1)
    assert "truncated" in refuse(tmp_path, "-i", source)
    assert "truncated" in refused(run("verify", source))


def test_input_that_is_no_file(tmp_path):
    assert "can't be opened" in refuse(tmp_path, "-i", tmp_path / "missing.safetensors")
    assert "is a folder" in refuse(tmp_path, "-i", tmp_path)
    assert "can't be opened" in refuse(tmp_path, "-i", tmp_path / "two\nlines")
    assert "can't be opened" in refused(run("verify", tmp_path / "missing.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_that_is_not_finite_is_named(tmp_path, value, dtype):
    tensors = transformer(dtype)
    tensors["blocks.1.mlp.fc.weight"][5, 7] = value
    source = save(tmp_path / "in.safetensors", tensors)
    for flags in (["--nvfp4"], ["--int8", "--simple"], ["--simple"]):
        line = refuse(tmp_path, "-i", source, "-o", tmp_path / "out.safetensors", *flags)
        assert "blocks.1.mlp.fc.weight holds NaN or Inf" in line


@pytest.mark.parametrize("value", [1e300, -1e300, 2e30])
def test_a_weight_that_would_leave_float32_is_named(tmp_path, value):
    source = save(tmp_path / "in.safetensors", {"a.weight": torch.full((4, 4), value, dtype=torch.float64)})
    assert "a.weight holds" in refuse(tmp_path, "-i", source)


def test_the_largest_weight_survives_the_longest_sum_of_a_rotation(tmp_path):
    """Signs as in the rows of the Hadamard matrix: every rotated row ends in one weight."""
    rows = lrq_kernels.rotate_hadamard(torch.eye(1024), 1024)[:16].sign() * 2.0**100
    source, output = save(tmp_path / "in.safetensors", {"a.weight": rows}), tmp_path / "out.safetensors"
    flags = ("--int8", "--scaling_mode", "row", "--convrot", "--convrot-group-size", "1024")
    assert run("convert", "-i", source, "-o", output, *flags).exit_code == 0
    assert run("verify", output, "--source", source).exit_code == 0


def test_a_failure_keeps_the_file_that_was_there(tmp_path):
    source = save(tmp_path / "in.safetensors", {"a.weight": torch.full((4, 4), torch.nan)})
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    refuse(tmp_path, "-i", source, "-o", tmp_path / "out.safetensors")


def test_nothing_to_quantize_says_why(tmp_path):
    kept = {"norm.weight": normal(4, 4), "embed_tokens.weight": normal(9, 4), "x.weight": normal(3, 3, 3)}
    source = save(tmp_path / "in.safetensors", kept)
    words = "no layer can be quantized (1 layer: embedding; 1 layer: norm; 1 layer: 3-D)"
    assert refuse(tmp_path, "-i", source).endswith(words)


def test_output_is_the_input(tmp_path, source):
    (tmp_path / "symbolic").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    for target in (source, tmp_path / "symbolic", tmp_path / "hard", tmp_path / "." / "in.safetensors"):
        assert "output and input are the same file" in refuse(tmp_path, "-i", source, "-o", target)
    assert "same file" in refuse(tmp_path, "-i", tmp_path / "symbolic", "-o", source)


def test_output_that_cannot_be_written(tmp_path, source):
    file = tmp_path / "file"
    file.write_text("not a folder")
    os.mkfifo(tmp_path / "pipe")
    assert "no such folder" in refuse(tmp_path, "-i", source, "-o", tmp_path / "missing" / "out")
    assert "no such folder" in refuse(tmp_path, "-i", source, "-o", file / "out")
    assert "is a folder" in refuse(tmp_path, "-i", source, "-o", tmp_path)
    assert "is a device or a pipe" in refuse(tmp_path, "-i", source, "-o", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert "too long" in refuse(tmp_path, "-i", source, "-o", tmp_path / ("n" * 300))
    if Path("/proc/self").is_dir():
        assert "can't write there" in refuse(tmp_path, "-i", source, "-o", "/proc/self/out.safetensors")


COMBINATIONS = {
    "--int8 --nvfp4": "--int8 and --nvfp4: choose one format",
    "--nvfp4 --mxfp8": "--nvfp4 and --mxfp8: choose one format",
    "--int8 --nvfp4 --mxfp8": "choose one format",
    "--convrot": "--convrot: rotates INT8 with one scale a row only",
    "--int8 --convrot": "--convrot",
    "--nvfp4 --convrot": "--convrot",
    "--int8 --block_size 16 --convrot": "--convrot",
    "--int8 --scaling_mode row --convrot --convrot-group-size 32": "must be a power of 4",
    "--int8 --scaling_mode row --convrot --convrot-group-size 2": "must be at least 4",
    "--int8 --scaling_mode row --convrot --convrot-group-size 1024": "K must be a multiple of the ConvRot group 1024",
    "--int8 --scaling_mode row --convrot-group-size 16": "has no meaning without --convrot",
    "--block_size 64": "--block_size 64: needs --scaling_mode block",
    "--int8 --scaling_mode tensor --block_size 64": "needs --scaling_mode block, not tensor",
    "--int8 --scaling_mode row --block_size 64": "needs --scaling_mode block, not row",
    "--int8 --block_size 0": "--block_size: must be at least 1",
    "--int8 --block_size 48": "N and K must be multiples of the block 48, got 32 x 64",
    "--nvfp4 --block_size 32": "--nvfp4 has blocks of 16, not 32",
    "--mxfp8 --scaling_mode row": "--mxfp8 has its own blocks of 32",
    "--scaling_mode channel": "'channel' is not one of",
    "--num_iter 0": "--num_iter: must be at least 1",
    "--num_iter many": "'many' is not a valid integer",
    "--top_p 1.5": "--top_p: must be from 0.0 to 1.0",
    "--top_p nan": "--top_p: must be from 0.0 to 1.0",
    "--coherence inf": "--coherence",
    "--min_k 9 --max_k 8": "--max_k 8: must not be below --min_k 9",
    "--seed -1": "--seed: must be at least 0",
    "--exclude-layers (": "not a regular expression",
    "--exclude-layers nowhere": "finds no layer to exclude",
    "--exclude-layers .": "no layer can be quantized (1 layer: excluded by --exclude_layers)",
    "--device gpu": "--device gpu: no such device; choose auto, cpu, cuda",
    "--device meta": "--device meta: holds no data",
    "--device hpu": "--device hpu",
    "--no-such-flag": "No such option",
    "stray": "unexpected extra argument",
    "--block_size": "requires an argument",
}


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_flags_that_have_no_meaning(tmp_path, source, flags):
    assert COMBINATIONS[flags] in refuse(tmp_path, "-i", source, *flags.split())


def test_usage_errors_are_one_line_everywhere():
    assert "Missing option" in refused(run("convert", "--int8"))
    assert "Missing argument" in refused(run("verify"))
    assert "No such option" in refused(run("verify", "file", "--no-such-flag"))
    assert refused(run("verify", "out", "in")).endswith("the checkpoint it was made from is --source in")


def test_a_legacy_scaled_fp8_file_is_refused(tmp_path):
    """With new markers in the header ComfyUI would not look at its ``scale_weight`` any more."""
    legacy = {"m.a.weight": normal(16, 16), "m.b.weight": normal(16, 16).to(torch.float8_e4m3fn)}
    legacy |= {"m.b.scale_weight": torch.ones(1), "m.scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    source = save(tmp_path / "in.safetensors", legacy)
    assert "legacy scaled_fp8" in refuse(tmp_path, "-i", source)


def test_a_tensor_in_the_way_is_named(tmp_path):
    source = save(tmp_path / "in.safetensors", {"a.weight": normal(16, 16), "a.weight_scale_2": torch.ones(1)})
    assert "tensor a.weight_scale_2 stands in the way" in refuse(tmp_path, "-i", source, "--nvfp4")


def test_a_real_process_says_one_line(tmp_path):
    running = [process("convert", "-i", tmp_path / "missing"), process("convert", "-i", "x", "--later-flag")]
    for one in running:
        out, err = one.communicate()
        assert (one.returncode, out, len(err.splitlines())) == (2, "", 1), err


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, source):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    before = everything(tmp_path)
    one = process("convert", "-i", source, "-o", tmp_path / "out.safetensors", "--simple", preexec_fn=limit)
    out, err = one.communicate()
    assert (one.returncode, out, len(err.splitlines())) == (2, "", 1), err
    assert "can't reserve" in err or "can't be written" in err
    assert everything(tmp_path) == before


def test_the_source_is_never_touched(tmp_path, source):
    before = load(source).tensors
    run("convert", "-i", source, "-o", tmp_path / "out.safetensors", "--nvfp4", "--simple")
    assert all(torch.equal(tensor, before[name]) for name, tensor in load(source).tensors.items())


@pytest.mark.parametrize(("backend", "words"), [("tpu", "no such backend"), ("cuda", "was asked for, but")])
def test_a_forced_backend_that_is_not_there(tmp_path, source, monkeypatch, backend, words):
    if backend == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    monkeypatch.setenv("LRQ_BACKEND", backend)
    assert words in refuse(tmp_path, "-i", source, "--nvfp4", "--simple")


@pytest.mark.parametrize(
    "setting", [{"num_iter": "3"}, {"exclude_layers": 5}, {"nvfp4": "yes"}, {"min_k": True}, {"comfy_quant": False}]
)
def test_python_settings_of_the_wrong_type_are_named(tmp_path, source, setting):
    with pytest.raises(InputError, match=f"--{next(iter(setting))}: "):
        lrq.quantize(source, tmp_path / "out.safetensors", **setting)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_a_pipe_is_not_waited_for(tmp_path, command):
    os.mkfifo(tmp_path / "pipe")
    args = ("-i", tmp_path / "pipe") if command == "convert" else (tmp_path / "pipe",)
    assert "is a pipe or a device" in refused(run(command, *args))


def test_a_layer_quantized_without_a_marker_is_named(tmp_path):
    tensors = {**transformer(), "blocks.0.q.weight": normal(16, 32).to(torch.float8_e4m3fn)}
    tensors["blocks.0.q.weight_scale"] = torch.tensor(0.5)
    save(tmp_path / "half.safetensors", tensors)
    assert "layer blocks.0.q: quantized already, but without a marker" in refuse(
        tmp_path, "-i", tmp_path / "half.safetensors", "--nvfp4", "--simple"
    )


def test_an_expression_too_large_for_a_number_is_one_line(tmp_path, source):
    assert "not a regular expression" in refuse(tmp_path, "-i", source, "--exclude-layers", "a{99999999999}")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("new/", "names a folder"),
        ("", "the name is empty"),
        ("out.GGUF", "lrq writes safetensors; let the name end in"),
    ],
)
def test_output_that_names_no_file(source, output, words):
    assert words in refuse(source.parent, "-i", source, "-o", output)


def test_a_read_only_output_is_kept(tmp_path, source, monkeypatch):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "read-only" in refuse(tmp_path, "-i", source, "-o", target)
