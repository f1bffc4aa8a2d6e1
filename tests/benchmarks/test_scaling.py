"""benchmarks/scaling.py on few slides: a minute each, in which Ray's workers are started again and again."""

import sys

import pytest

from tests.benchmarks.scripts import imported

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc"),
]


@pytest.fixture
def scaling(ray, monkeypatch, capsys):
    """What the benchmark prints when it is given flags."""
    module = imported("scaling")
    monkeypatch.setattr(module, "be_quiet", lambda: None)  # it would stay so for other tests

    def run(*flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["scaling.py", *flags])
        module.main()
        return capsys.readouterr().out

    return run


def test_prints_overhead(scaling):
    printed = scaling("--slides", "2000", "--parts", "overhead")
    assert "### Overhead: 2,000 slides that take no time" in printed
    assert [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| Ray")] == [
        "| Ray, 1 actor",
        "| Ray, 2 actors",
    ]


def test_ten_thousand_slides_need_no_more_memory(scaling):
    printed = scaling("--slides", "10000", "--parts", "memory")
    assert "10,000 are reported" in printed
    rows = dict(
        line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith(("| before", "| after"))
    )
    assert 0 < float(rows["after"]) <= float(rows["before"]) + 25
