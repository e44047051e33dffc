"""Where the file goes, and where the words go."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from checkpoints import normal, run, save


def test_output_behind_a_link_is_written_there(tmp_path):
    source = save(tmp_path / "in.safetensors", {"a.weight": normal(16, 16)})
    there, link = tmp_path / "there.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(there)
    assert run("convert", "-i", source, "-o", link, "--simple").exit_code == 0
    assert link.is_symlink() and there.stat().st_size > 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_encoding_of_the_output_will_do(tmp_path, encoding):
    source = save(tmp_path / "in.safetensors", {"λ\u2028.weight": normal(16, 16)})
    output = tmp_path / "out.safetensors"
    environment = dict(os.environ, PYTHONIOENCODING=encoding)
    for arguments in (
        ("convert", "--help"),
        ("convert", "-i", source, "-o", output, "--verbose"),
        ("verify", output, "--source", source),
    ):
        command = [sys.executable, "-m", "lrq.cli", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
