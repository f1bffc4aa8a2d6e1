"""benchmarks/scaling.py on few slides."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")


@pytest.mark.slow
def test_prints_overhead_and_memory(ray, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scaling = pytest.importorskip("scaling")
    monkeypatch.setattr(scaling, "be_quiet", lambda: None)  # it would stay so for other tests
    monkeypatch.setattr("sys.argv", ["scaling.py", "--slides", "2000", "--parts", "overhead", "memory"])
    scaling.main()
    printed = capsys.readouterr().out
    assert "### Overhead: 2,000 slides that take no time" in printed
    assert [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| Ray")] == [
        "| Ray, 1 actor",
        "| Ray, 2 actors",
    ]
    assert "2,000 are reported" in printed
    rows = dict(
        line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith(("| before", "| after"))
    )
    assert 0 < float(rows["after"]) <= float(rows["before"]) + 50
