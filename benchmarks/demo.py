"""`make demo`: a real trained model becomes an NVFP4 file that ComfyUI loads, and the proof is printed."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from lrq.cli import main
from real_models import minilm_folder

FOLDER = Path(__file__).parents[1] / "demo"


def run(*arguments: str) -> None:
    print("\n$ lrq " + shlex.join(arguments), flush=True)
    try:
        main(arguments, prog_name="lrq")
    except SystemExit as stop:
        if stop.code:
            sys.exit(stop.code)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    source = FOLDER / "all-MiniLM-L6-v2.safetensors"
    source.write_bytes((minilm_folder() / "model.safetensors").read_bytes())
    output = FOLDER / "all-MiniLM-L6-v2-nvfp4.safetensors"
    given, made = (os.path.relpath(path) for path in (source, output))
    run("convert", "-i", given, "-o", made, "--nvfp4", "--comfy_quant")
    run("verify", made, "--source", given)
