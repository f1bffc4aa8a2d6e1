"""The benchmark runs, and its plain way is the same mathematics as ours: the same losses, the same folds."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from tests.benchmarks.scripts import imported, printed, table_cells


@pytest.fixture(scope="module")
def benchmark():
    return imported("nested_cv")


@pytest.fixture(scope="module")
def small(benchmark):
    return replace(benchmark.SMALL, slides=12, epochs=4, threads=1)


@pytest.fixture(scope="module")
def cohort(benchmark, small, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "cohort"
    benchmark.write_cohort(folder, small)
    return folder


def test_both_ways_lose_alike_on_ragged_chunks(benchmark, small, cohort, tmp_path):
    chunks = benchmark.PlainChunks(benchmark.Cohort.of(cohort), small.chunk_size)
    assert len({len(cut) for _, cut in chunks.items}) > 2
    assert len(set(np.bincount(chunks.slides))) > 1
    curves = benchmark.loss_curves(tmp_path / "small", small)
    assert curves["ours"].shape == curves["plain"].shape == (4, 2)
    assert np.ptp(curves["plain"], axis=0).min() > 1e-3
    assert benchmark.largest_difference(curves) < 1e-5


def test_plain_items_hold_every_patch_once(benchmark, small, cohort):
    read = benchmark.Cohort.of(cohort)
    chunks = benchmark.PlainChunks(read, small.chunk_size)
    for slide, path in enumerate(read.paths):
        items = [chunks[item] for item in chunks.of(np.array([slide]))]
        assert {item[1:] for item in items} == {(int(read.labels[slide]), slide)}
        with h5py.File(path) as file:
            np.testing.assert_array_equal(torch.cat([item[0] for item in items]), file["features"][()])


def test_padding_is_masked():
    bags = [torch.ones(2, 3), torch.ones(5, 3)]
    x, mask, labels, slides = imported("plain_training").pad_and_mask([(bags[0], 0, 7), (bags[1], 1, 8)])
    assert x.shape == (2, 5, 3)
    assert mask.tolist() == [[False, False, True, True, True], [False] * 5]
    assert x[mask].eq(0).all()
    assert (labels.tolist(), slides.tolist()) == ([0, 1], [7, 8])


def test_both_ways_test_the_same_folds(benchmark, small, cohort, tmp_path):
    plan = replace(small, epochs=1)
    for way in benchmark.WAYS:
        parts = benchmark.timed(way, plan, cohort, tmp_path / way)
        assert list(parts) == ["before the first training", "from there to the results", "in all"]
        assert all(wall >= 0 for wall, _ in parts.values())
        assert 0 <= benchmark.pooled_auc(cohort, tmp_path / way) <= 1
    folds = [pd.read_csv(tmp_path / way / "predictions.csv", index_col="wsi_id")["fold"] for way in benchmark.WAYS]
    pd.testing.assert_series_equal(*[fold.sort_index() for fold in folds])
    assert len(folds[0]) == plan.slides


@pytest.mark.slow
def test_prints_both_tables():
    flags = "--slides 12 --patches 60 --dim 16 --chunk_size 25 --n_outer 2 --n_inner 2 --epochs 1 --turns 1 --threads 1"
    out = printed("nested_cv", *flags.split())
    rows = table_cells(out)
    names = ["an epoch of training", "a validation", "before the first training", "from there to the results", "in all"]
    assert [row[0] for row in rows if row[0] in names] == names
    for row in rows:
        if row[0] in names:
            # A ratio to less processor time than is counted is no number.
            assert not any(float(cell) < 0 for cell in row[1:]), row
    assert "12 slides of about 60 x 16" in out
