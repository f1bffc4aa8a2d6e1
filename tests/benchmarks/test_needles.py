"""The benchmark of few key instances: what it draws, how it labels chunks, what it counts, and what it prints."""

import math
import sys

import numpy as np
import pytest
import scipy.io

from tests.benchmarks.scripts import imported

CLASSES = np.repeat(np.arange(1, 9), 20)


@pytest.fixture(scope="module")
def needles():
    return imported("needles")


def tile_features() -> np.ndarray:
    """Of each tile the first feature is its number, so that it can be followed."""
    return np.stack([np.arange(160.0), np.random.default_rng(0).random(160)], axis=1)


def test_bags_are_of_disjoint_tiles_and_have_few_keys(needles):
    bags = needles.draw_bags(tile_features(), CLASSES, 300, 3, (6, 4), seed=1)
    assert [bag.shape for bag in bags.features] == [(300, 2)] * 10
    assert bags.labels.tolist() == [0, 1] * 5
    assert bags.is_key.sum(axis=1).tolist() == [0, 3] * 5
    tiles = [set(np.round(bag[:, 0], 6).tolist()) for bag in bags.features]
    assert not set().union(*tiles[:6]) & set().union(*tiles[6:])
    assert len(np.unique(bags.features[1][bags.is_key[1]], axis=0)) == 3
    again = needles.draw_bags(tile_features(), CLASSES, 300, 3, (6, 4), seed=1)
    other = needles.draw_bags(tile_features(), CLASSES, 300, 3, (6, 4), seed=2)
    assert np.array_equal(bags.features, again.features)
    assert not np.array_equal(bags.features, other.features)


def test_the_chance_of_a_chunk_without_a_key_is_that_of_drawing(needles):
    assert needles.without_key(2000, 10, 250) == pytest.approx(math.comb(1990, 250) / math.comb(2000, 250))
    assert needles.without_key(2000, 3, 1000) == pytest.approx(math.comb(1997, 1000) / math.comb(2000, 1000))
    assert needles.without_key(20, 15, 10) == 0  # a chunk is larger than the patches that are no keys
    assert needles.without_key(2000, 3, 2000) == needles.without_key(2000, 3, None) == 0


def test_only_true_labels_know_which_chunks_have_a_key(needles, tmp_path):
    bags = needles.draw_bags(tile_features(), CLASSES, 40, 2, (8, 4), seed=1)
    needles.written(bags.features, bags.labels, tmp_path)
    keys = {tuple(tile) for bag, is_key in zip(bags.features, bags.is_key, strict=True) for tile in bag[is_key]}
    found = {}
    for true_labels in (False, True):
        dataset = needles.opened(tmp_path, bags, needles.Way(10, true_labels))
        batches = list(dataset.batches(np.arange(8), 4, seed=3))
        chunks = [
            (chunk, int(label)) for batch in batches for chunk, label in zip(batch.bags, batch.labels, strict=True)
        ]
        found[true_labels] = [(label, any(tuple(tile) in keys for tile in chunk.numpy())) for chunk, label in chunks]
    assert len(found[False]) == len(found[True]) == 32
    assert sum(label for label, _ in found[False]) == 16
    assert all(label == has_key for label, has_key in found[True])
    assert 4 <= sum(label for label, _ in found[True]) < 16


def test_the_top_holds_as_many_keys_as_there_can_be(needles):
    values = np.arange(100.0)
    assert needles.recall_of_top(values, values >= 97) == 1
    assert needles.recall_of_top(values, values >= 70) == 1
    assert needles.recall_of_top(values, np.isin(values, [0, 50, 95, 99])) == 0.5


def test_prints_a_row_for_each_way_of_training(needles, tmp_path, monkeypatch, capsys):
    features = tile_features()
    features[:20, 1] += 4  # tumour
    scipy.io.savemat(
        tmp_path / "tiles.mat",
        {"source_array": features.T, "target_array": (np.arange(1, 9)[:, None] == CLASSES).astype(float)},
    )
    flags = ["--models", "LiteMIL", "--patches", "60", "--keys", "6", "--chunk_sizes", "20", "--batch_sizes", "4"]
    flags += ["--bags", "8", "6", "--epochs", "2", "--seeds", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["needles.py", str(tmp_path / "tiles.mat"), *flags])
    needles.main()
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| 60, 6, ")]
    told, *rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert told[0] == "60, 6, told"
    assert float(told[-1].split(" ± ")[0]) > 0.9
    assert [cell == "-" for cell in told[1:]] == [True] * 6 + [False, True, False]
    assert [row[0].removeprefix("60, 6, LiteMIL, ") for row in rows] == [
        "chunks of 20", "chunks of 20, true labels", "whole", "whole, batch of 4",
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["16", "16", "16", "4"]  # 3 chunks of a bag, of which 3 make a batch
    chance = f"{100 * math.comb(54, 20) / math.comb(60, 20):.1f}%"
    assert [row[2] for row in rows] == [chance, chance, "0.0%", "0.0%"]
    for row in rows[2:]:
        assert row[4] == row[5]  # trained whole, a bag is tested whole
    assert all(0 <= float(cell.split(" ± ")[0]) <= 1 for row in rows for cell in row[4:])
