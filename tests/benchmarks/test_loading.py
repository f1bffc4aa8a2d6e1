"""The loading benchmark runs, and every contender reads the same features."""

import numpy as np
import pytest
import torch

from tests.benchmarks.scripts import imported, printed, table_cells


@pytest.fixture(scope="module")
def loading():
    return imported("loading")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_prints_a_row_per_contender_and_a_column_per_layout(dtype):
    flags = ["--slides", "2", "--patches", "1500", "--dim", "16", "--repeats", "1", "--threads", "1", "--dtype", dtype]
    out = printed("loading", *flags)
    rows = table_cells(out)
    cells = {row[0]: row[1:] for row in rows if len(row) == 5 and row[0] and not row[0].startswith("-")}
    assert len(cells) == 6
    for name, row in cells.items():
        ratios = [float(cell.partition("(")[2].rstrip(")")) for cell in row]
        assert all(ratio > 0 for ratio in ratios), name
        assert name != "first version" or ratios == [1.0] * 4
    assert "2 slides of 1,500 x 16" in out
    assert "Lengths and labels of 500 small slides" in out


@pytest.mark.parametrize("layout", ["CLAM, (32, D)", "TRIDENT, (1, D)", "contiguous", "LiteMIL"])
def test_all_contenders_read_every_patch_once(loading, layout, tmp_path):
    features = np.arange(2 * 1500, dtype=np.float32).reshape(2, 1500, 1) * [1, 1]
    (tmp_path / "features").mkdir()
    paths = [tmp_path / "features" / f"S{number}.h5" for number in range(2)]
    for path, bag in zip(paths, features.astype(np.float32), strict=True):
        loading.LAYOUTS[layout](path, bag, np.zeros((1500, 2), np.int64))
    for name, run in loading.contenders(paths, tmp_path).items():
        found = torch.cat(list(run()))
        assert sorted(found[:, 0].tolist()) == list(range(3000)), name
