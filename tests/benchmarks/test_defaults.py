"""The benchmark of which epoch is kept reads every rule from the same trainings."""

import sys
from pathlib import Path

import pytest

from tests.cohort import write_cohort

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_rule_has_its_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    defaults = pytest.importorskip("defaults")
    labels, features = write_cohort(tmp_path, patients_per_class=8, slides_per_patient=1, patches=(4, 9))
    flags = ["--cohort", labels, features, "--models", "meanPool", "--lr", "1e-3", "--epochs", "3"]
    monkeypatch.setattr(sys, "argv", ["defaults.py", *map(str, flags)])
    defaults.main()
    printed = capsys.readouterr().out
    for rule in defaults.RULES:
        assert f"| meanPool, 0.001, {rule} |" in printed
    (last,) = [line for line in printed.splitlines() if line.startswith("| meanPool, 0.001, last |")]
    assert last.split("|")[2].strip() == "3"
