"""Many inputs: none overwrites another's output, none stops the others, and lrq's own outputs are no inputs."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

import lrq.cli.batch
from checkpoints import process, run, save, transformer

FLAGS = ("--nvfp4", "--simple")


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "g"
    made.mkdir()
    save(made / "a.safetensors", transformer())
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_name_the_system_refuses_does_not_stop_the_others(folder):
    inputs = ("-i", folder / ("n" * 300), "-i", folder / "a.safetensors")
    result = run("convert", *inputs, *FLAGS)
    first, *_, last = result.stderr.splitlines()
    assert result.exit_code == 2 and first.startswith("error: ") and "File name too long" in first
    assert last.startswith("1 of 2 inputs converted; failed: ") and "a-nvfp4.safetensors" in names(folder)


def test_an_error_of_the_system_does_not_stop_the_others(folder, monkeypatch):
    save(folder / "b.safetensors", transformer())
    convert = lrq.cli.batch._convert

    def failing(source: str, *args: object) -> None:
        if source.endswith("a.safetensors"):
            raise PermissionError(13, "Permission denied", source)
        convert(source, *args)

    monkeypatch.setattr(lrq.cli.batch, "_convert", failing)
    result = run("convert", "-i", folder / "a.safetensors", "-i", folder / "b.safetensors", *FLAGS)
    assert result.exit_code == 2 and "1 of 2 inputs converted" in result.stderr
    assert f"error: {folder / 'a.safetensors'}: Permission denied" in result.stderr.splitlines()
    assert "b-nvfp4.safetensors" in names(folder)


@pytest.mark.parametrize("to", [False, True])
@pytest.mark.parametrize("other", ["a.bin", "a.sft"])
def test_two_inputs_of_one_stem_do_not_overwrite_each_other(folder, tmp_path, to, other):
    if other == "a.bin":
        torch.save({"x.weight": torch.ones(32, 32)}, folder / other)
    else:
        save(folder / other, {"x.weight": torch.ones(32, 32)})
    (tmp_path / "out").mkdir()
    where = ("-o", tmp_path / "out") if to else ()
    result = run("convert", "-i", folder / "a.safetensors", "-i", folder / other, *FLAGS, *where)
    assert result.exit_code == 2 and "its output would be named as that of" in result.stderr
    output = (tmp_path / "out" if to else folder) / "a-nvfp4.safetensors"
    assert run("verify", output, "--source", folder / "a.safetensors").exit_code == 0


def test_a_glob_leaves_out_what_lrq_made(folder):
    save(folder / "b.safetensors", transformer())
    pattern = folder / "*.safetensors"
    assert run("convert", "-i", pattern, *FLAGS).exit_code == 0
    before = names(folder)
    again = run("convert", "-i", pattern, *FLAGS)
    assert again.exit_code == 0 and names(folder) == before
    notices = [line for line in again.stderr.splitlines() if "skipped, lrq made it" in line]
    assert len(notices) == 2 and all(line.startswith("notice: ") for line in notices)
    assert "a-nvfp4" not in run("convert", "-i", pattern, *FLAGS, "--dry-run").stdout
    only = run("convert", "-i", folder / "*-nvfp4.safetensors", *FLAGS)
    assert (
        only.exit_code == 2 and len(only.stderr.splitlines()) == 1 and "finds only files that lrq made" in only.stderr
    )
    named = run("convert", "-i", pattern, "-i", folder / "a-nvfp4.safetensors", *FLAGS)
    assert "a-nvfp4.safetensors: skipped" not in named.stderr


@pytest.mark.parametrize("inputs", [["a*.safetensors"], ["a.safetensors", "a.safetensors"]])
def test_a_folder_takes_the_one_output_of_a_glob(folder, tmp_path, inputs):
    out = tmp_path / "out"
    out.mkdir()
    given = [word for name in inputs for word in ("-i", folder / name)]
    assert run("convert", *given, *FLAGS, "-o", out).exit_code == 0
    assert names(out) == ["a-nvfp4.safetensors"]
    assert run("convert", *given, *FLAGS, "-o", tmp_path / "one.safetensors").exit_code == 0
    assert (tmp_path / "one.safetensors").is_file()


def test_a_template_that_does_not_fit_names_its_file_and_leaves_nothing(folder):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))

    args = ("convert", "-i", folder / "a.safetensors", *FLAGS, "--dry-run", "create-template")
    one = process(*args, "-o", folder / "t.json", preexec_fn=limit)
    out, err = one.communicate()
    assert (one.returncode, out) == (2, "")
    assert err == f"error: {folder / 't.json'}: can't be written: File too large\n"
    assert names(folder) == ["a.safetensors"]
    assert run(*args, "-o", folder / "t.json").exit_code == 0
    assert names(folder) == ["a.safetensors", "t.json"]
