"""The README's figures are those of the kept results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_kernel_table_is_that_of_the_results(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kernel_table

    readme = (ROOT / "README.md").read_text()
    assert kernel_table.placed(readme, json.loads(kernel_table.RESULTS.read_text())) == readme
    del sys.modules["kernel_table"]
