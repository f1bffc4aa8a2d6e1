"""The prediction benchmark runs, and a slide's features are never in memory as a whole."""

import sys

import pytest

from tests.benchmarks.scripts import printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read off Linux's /proc")
def test_a_slides_features_are_streamed():
    """205 MB of features, twice that in single precision."""
    flags = ["--patches", "100000", "--dim", "1024", "--models", "LiteMIL", "--repeats", "1"]
    out = printed("prediction", *flags)
    (row,) = [line for line in out.splitlines() if line.startswith("| LiteMIL")]
    ratio, memory, _, _, faithfulness = (cell.strip() for cell in row.strip("| ").split("|")[1:])
    assert 0 < float(memory.removesuffix(" MB")) < 130
    assert float(ratio) > 0
    assert float(faithfulness) > 0
