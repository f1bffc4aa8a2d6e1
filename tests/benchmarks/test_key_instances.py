"""The key-instance benchmark: what it draws, what it measures, and its file where it is there."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.benchmarks.scripts import imported, printed


@pytest.fixture(scope="module")
def key_instances():
    return imported("key_instances")


def test_bags_are_of_disjoint_tiles_and_know_their_keys(key_instances):
    # Of each tile the first feature is its number, so that it can be followed.
    features = np.stack([np.arange(5000.0), np.random.default_rng(0).random(5000)], axis=1)
    classes = np.repeat(np.arange(1, 9), 625)
    bags, keys, labels = key_instances.draw_bags(features, classes, seed=3)
    assert (len(bags), keys.shape, labels.mean()) == (400, (400, 30), 0.5)
    counts = keys.sum(axis=1)
    assert set(counts[labels == 1]) == {2, 3, 4, 5}
    assert not counts[labels == 0].any()
    tiles = [np.round(bag[:, 0], 6) for bag in bags]
    assert all(len(set(bag.tolist())) == 30 for bag in tiles)
    training, test = (set(np.concatenate(part).tolist()) for part in (tiles[:300], tiles[300:]))
    assert not training & test
    again = key_instances.draw_bags(features, classes, seed=3)
    assert all(np.array_equal(one, other) for one, other in zip(bags, again[0], strict=True))
    other, *_ = key_instances.draw_bags(features, classes, seed=4)
    assert not np.array_equal(bags[0], other[0])


@pytest.mark.slow
def test_prints_a_row_for_each_map(shared_data):
    cells = rows_of(shared_data / "bags" / "kather5000_best3_49feat.mat", "--seeds", "1", "--models", "LiteMIL")
    attention, evidence = ([float(cell) for cell in row[2:]] for row in cells)
    assert [row[1] for row in cells] == ["attention", "evidence"]
    assert min(attention[0], attention[1], evidence[1]) > 0.8  # bags and key AUC
    # In bags called negative the most attended tiles argue against that, those with most evidence for it.
    assert attention[2] < 0 < min(evidence[2], evidence[3])
    assert min(evidence[4], evidence[5]) > 0.9


@pytest.mark.slow
def test_a_cohort_is_measured_out_of_fold(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    lines = ["case_id,wsi_id,label"]
    for number in range(40):
        features, is_key = rng.standard_normal((30, 16)), np.zeros(30, dtype=np.int8)
        if number % 2:
            is_key[:10] = 1
            features[:10, 0] += 3
        with h5py.File(tmp_path / "features" / f"s{number}.h5", "w") as file:
            file["features"], file["inst_labels"] = features.astype(np.float32), is_key
        lines.append(f"p{number},s{number},{'sick' if number % 2 else 'well'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    for row in rows_of(tmp_path, "--positive", "sick", "--models", "LiteMIL"):
        assert float(row[3].split()[0]) > 0.8
        assert row[-1] == "0.333"


def rows_of(*flags: str | Path) -> list[list[str]]:
    out = printed("key_instances", *flags)
    lines = [line for line in out.splitlines() if line.startswith("| LiteMIL")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
