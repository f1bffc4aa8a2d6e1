"""The key-instance benchmark: what it draws, what it measures, and its file where it is there."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def key_instances():
    sys.path.insert(0, str(BENCHMARKS))
    yield pytest.importorskip("key_instances")
    sys.path.remove(str(BENCHMARKS))


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


def test_key_auc_is_the_area_under_the_roc_curve(key_instances):
    rng = np.random.default_rng(0)
    for _ in range(20):
        attention, keys = rng.integers(0, 9, 30) / 9, rng.random(30) < 0.2
        if 0 < keys.sum() < 30:
            assert key_instances.key_auc(attention, keys) == pytest.approx(roc_auc_score(keys, attention))


@pytest.mark.slow
def test_prints_a_row_per_model(shared_data):
    flags = [shared_data / "bags" / "kather5000_best3_49feat.mat", "--seeds", "1", "--models", "LiteMIL"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "key_instances.py", *flags], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| LiteMIL")]
    bags, key, deletion, insertion, beats = (float(cell) for cell in row.strip("| ").split("|")[1:])
    assert bags > 0.8
    assert key > 0.8
    assert min(deletion, insertion) > 0.1
    assert beats > 0.9
