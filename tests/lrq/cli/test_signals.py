"""What ends a run from outside: it says so, and the same command goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lrq.pipeline
from checkpoints import convert, normal, process, run, save


@pytest.fixture
def source(tmp_path) -> Path:
    return save(tmp_path / "in.safetensors", {"blocks.0.fc.weight": normal(32, 64), "blocks.0.fc.bias": normal(32)})


def heed_signals() -> None:
    """A shell's background job ignores SIGINT, and its children with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_signals_leave_a_run_that_goes_on(tmp_path):
    """Nobody reads the children's words at first: a full pipe holds them in the middle of the work."""
    long = "a-name-so-long-that-the-lines-fill-every-pipe" * 5
    tensors = {f"blocks.{i}.{long}.weight": normal(16, 16) for i in range(800)}
    source = save(tmp_path / "many.safetensors", tensors)
    running = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        folder = tmp_path / number.name
        folder.mkdir()
        flags = ("-o", folder / "out.safetensors", "--simple", "--verbose")
        running[number, folder] = process("convert", "-i", source, *flags, preexec_fn=heed_signals)
    for (number, folder), one in running.items():
        assert one.stderr.readline().startswith("model: not recognised")
        assert one.stderr.readline().startswith("fp8  blocks.0.")
        one.send_signal(number)
        _, err = one.communicate()
        last = err.splitlines()[-1]
        assert (one.returncode, last.startswith("error: interrupted; ")) == (130, True), last
        assert last.endswith(".partial; the same command goes on from there")
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["out.safetensors.partial", "out.safetensors.partial.journal"]
    convert(source, tmp_path / "whole")
    for _, folder in running:
        convert(source, folder / "out.safetensors")
        assert (folder / "out.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()


def test_handlers_of_signals_are_put_back_and_nohup_is_heeded(tmp_path, source, monkeypatch):
    during = []
    real = lrq.pipeline.quantize_layer
    monkeypatch.setattr(
        "lrq.pipeline.quantize_layer", lambda *a: (during.append(signal.getsignal(signal.SIGHUP)), real(*a))[1]
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        run("convert", "-i", source, "-o", tmp_path / "out.safetensors", "--simple")
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert during == [signal.SIG_IGN]


def test_a_signal_while_torch_is_imported_ends_the_run(tmp_path, source):
    command = [sys.executable, "-m", "lrq.cli", "convert", "-i", str(source), "-o", str(tmp_path / "o.safetensors")]
    for delay in (0.1, 0.3, 0.5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (-signal.SIGTERM, 130, 0)
        assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_signal_inside_an_import_is_not_swallowed(tmp_path):
    """importlib catches what is raised in some of its callbacks."""
    program = """if True:
        import os, signal, sys
        class Finder:
            def find_spec(self, name, *_):
                if name == "torch":
                    try:
                        os.kill(os.getpid(), signal.SIGINT)
                    except KeyboardInterrupt:
                        pass
        sys.meta_path.insert(0, Finder())
        from lrq.cli.main import main
        main(["backends"])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=heed_signals)
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was written\n"), done
