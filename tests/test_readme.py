"""The README's figures are those of the kept results."""

from __future__ import annotations

from pathlib import Path

import readme_tables


def test_the_tables_are_those_of_the_results() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert readme_tables.with_tables(readme) == readme
