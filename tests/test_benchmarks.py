"""README's figures are those that the benchmark wrote."""

import json
import sys

from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "benchmarks"))

import generalisation
import other_parts


def test_table_of_readme_is_made_from_the_benchmark():
    table = generalisation.table(json.loads(generalisation.RESULTS.read_text()))
    assert table in (ROOT / "README.md").read_text()


def test_table_of_other_parts_is_made_from_the_benchmark():
    table = other_parts.table(json.loads(other_parts.RESULTS.read_text())["kinds"])
    assert table in (ROOT / "docs" / "evaluation.md").read_text()
