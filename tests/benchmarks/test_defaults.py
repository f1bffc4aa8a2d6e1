"""The benchmark of which epoch is kept reads every rule from the same trainings, over seeds and learning rates."""

import sys

from tests.benchmarks.scripts import imported
from tests.cohort import write_cohort


def test_every_rule_has_its_columns(tmp_path, monkeypatch, capsys):
    defaults = imported("defaults")
    labels, features = write_cohort(tmp_path, patients_per_class=8, slides_per_patient=1, patches=(4, 9))
    assert (labels.parent, features.name) == (tmp_path, "features")
    flags = [tmp_path, "--models", "meanPool", "--lr", "1e-3", "3e-3", "--epochs", "3", "--seeds", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["defaults.py", *map(str, flags)])
    defaults.main()
    printed = capsys.readouterr().out
    for rule in defaults.RULES:
        assert f"| {tmp_path.name}, meanPool, 0.001, {rule} |" in printed
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in printed.splitlines() if "meanPool" in line}
    last, grid = (rows[f"{tmp_path.name}, meanPool, {choice}"] for choice in ("0.003, last", "grid"))
    assert last[0].strip() == "3"
    assert all("±" in cell for cell in last[1:])
    assert len(grid) == len(last)
