"""The classic benchmarks become cohorts, and the benchmark of them runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.scripts import imported, printed
from utils.mil_dataset import MILDataset


@pytest.fixture(scope="module")
def classic():
    return imported("classic")


@pytest.mark.parametrize(
    ("name", "bags", "positive", "instances", "dim"),
    [("musk1", 92, 47, 476, 166), ("tiger", 200, 100, 1220, 230), ("elephant", 200, 100, 1391, 230)],
)
def test_the_classic_benchmarks_are_cohorts(classic, shared_data, tmp_path, name, bags, positive, instances, dim):
    benchmark = shared_data / "bags" / f"{name}.npz"
    labels_csv, features_dir = classic.write_cohort(tmp_path, benchmark, standardised=False)
    dataset = MILDataset(labels_csv, features_dir, classic.CLASSES, cache=tmp_path / "packed")
    assert dataset.class_names == ("negative", "positive")
    assert (len(dataset), int(dataset.labels.sum()), dataset.input_dim) == (bags, positive, dim)
    with np.load(benchmark) as file:
        stored, index = file["X"], file["bag_index"]
    for slide, info in enumerate(dataset.info):
        np.testing.assert_array_equal(dataset.features(slide).numpy(), stored[index == slide])
        assert info.num_instances == (index == slide).sum()
    assert sum(len(bag) for batch in dataset.batches(range(bags), 32, seed=0) for bag in batch.bags) == instances


def write_synthetic(folder: Path, bags: int = 40) -> None:
    """A benchmark of the classic format whose positive bags hold an instance that says so (synthetic)."""
    rng = np.random.default_rng(0)
    index = np.repeat(np.arange(bags), 4)
    instances = rng.standard_normal((len(index), 6)) * 5 + 100
    labels = np.arange(bags) % 2
    instances[::4, 0] += 40 * labels
    instances[:, 5] = 1
    np.savez(folder / "musk1.npz", X=instances, bag_index=index, bag_label=2 * labels - 1)


def test_standardised_features_have_mean_0_and_spread_1(classic, tmp_path):
    write_synthetic(tmp_path)
    dataset = MILDataset(*classic.write_cohort(tmp_path / "cohort", tmp_path / "musk1.npz"))
    everything = np.concatenate([dataset.features(slide).numpy() for slide in range(40)])
    assert everything.mean(axis=0) == pytest.approx(0, abs=1e-5)
    assert everything.std(axis=0)[:5] == pytest.approx(1, abs=1e-5)
    assert (everything[:, 5] == 0).all()


@pytest.mark.slow
def test_prints_a_row_and_finds_it_again(tmp_path):
    write_synthetic(tmp_path)
    flags = ["--data", tmp_path, "--output", tmp_path / "out", "--benchmarks", "musk1", "--models", "ABMIL"]
    flags += ["--seeds", "0", "--n_outer", "2", "--epochs", "12"]
    rows = []
    for _ in range(2):
        out = printed("classic", *map(str, flags))
        rows.append(re.findall(r"^\| musk1, ABMIL \|.*", out, re.MULTILINE))
    assert rows[0] == rows[1]
    accuracy = re.match(r"\| musk1, ABMIL \| (\d\.\d+) \| (\d\.\d+) to (\d\.\d+) \|", rows[0][0])
    assert accuracy
    assert accuracy[1] == accuracy[2] == accuracy[3]
    assert float(accuracy[1]) > 0.8
