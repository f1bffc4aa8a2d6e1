"""Bags with few key instances: do chunks or whole bags find them, and what does a chunk's label noise cost?

    uv run benchmarks/needles.py kather5000_best3_49feat.mat
    uv run benchmarks/needles.py kather5000_best3_49feat.mat --models ABMIL --patches 4000 --keys 3 --seeds 1

A positive bag has a few tumour tiles among thousands of others, a negative bag has none. The tiles are those of
key_instances.py, split class by class for each seed: training bags are drawn from 70% of them, test bags from the
others, half of each positive. The tumour tiles of a bag are different ones. The others are drawn with replacement,
because a bag has more of them than there are: a tile repeats within a bag and in other bags.

A chunk has the label of its bag. In a positive bag a chunk without a key instance has a wrong label: label noise. These
ways of training are compared, each with train.py's settings and its last epoch (which train.py keeps in a cohort of
this size), so that no bag is needed to choose the epoch:

chunks of N               `--mode chunked --chunk_size N`; 1000 is the default
chunks of N, true labels  the same, but chunks of positive bags without a key instance are labelled negative. Nobody has
                          such labels; the difference from the row above is what the label noise costs
whole                     `--mode full`
whole, batch of N         `--mode full --batch_size N`: more steps in as many epochs (where `--batch_sizes` is given)

A test bag is fed as it was in training, as train.py does. The row "told" is no MIL: a classifier of tiles learns the
class of every training tile (a hidden layer of 64, stopped early on a tenth of them). It shows how many key instances
these features let anyone find.

steps          optimiser steps of a training
no key         the chance that a chunk of a positive training bag has no key instance
MB             features of a step's batch, in megabytes (10^6 bytes)
bag AUC        of the bag label, on the test bags; "whole": the same model, each test bag fed whole
top 10         of the 10 patches of greatest value in a positive test bag, how many are key instances, as a share of as
               many as could be (10, or all key instances where there are fewer); by attention, the mean of the heads,
               or by evidence for the positive class ("told": by its probability)
key AUC        how often, in a positive test bag, a key instance has a greater value than another patch

All figures are means over the seeds with their standard deviation.
"""

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from defaults import auc, mean_and_spread
from key_instances import CLASSES, TUMOUR, maps_by_class, read_tiles, split_tiles, written
from numpy.typing import NDArray
from report import processor, table, versions
from sklearn.neural_network import MLPClassifier

from MILS import build_mil
from MILS.bag_model import BagModel
from utils.bags.chunks import Chunk, take
from utils.bags.settings import CHUNK_SIZE, BatchSize
from utils.core.runtime import derive_seed, progress
from utils.learning.settings import Training
from utils.learning.training import ModelTraining
from utils.mil_dataset import MILDataset
from utils.prediction.forward_pass import SlideFeed, predict_features

TOP = 10
WHOLE = SlideFeed.of_mode("full", CHUNK_SIZE)
FIGURES = (
    "bag AUC", "bag AUC, whole", "top 10, attention", "top 10, evidence", "key AUC, attention", "key AUC, evidence",
)  # fmt: skip
HEADING = " | ".join(["patches, keys, model, training", "steps", "no key", "MB", *FIGURES])


@dataclass(frozen=True)
class Way:
    """A way of training: on chunks of at most `chunk_size` patches, with their bag's label or with true ones, or on
    whole bags (None).
    """

    chunk_size: int | None
    true_labels: bool = False
    batch_size: BatchSize = "auto"

    @property
    def name(self) -> str:
        batch = "" if self.batch_size == "auto" else f", batch of {self.batch_size}"
        labels = ", true labels" if self.true_labels else ""
        return ("whole" if self.chunk_size is None else f"chunks of {self.chunk_size}") + labels + batch


@dataclass(frozen=True)
class Bags:
    """Bags `(patches, D)`, the `training` first; of each patch whether it is a key instance `(bags, patches)`; of each
    bag its label; the training tiles `(tiles, D)`, and of each whether it is a key instance.
    """

    features: list[NDArray[np.float32]]
    is_key: NDArray[np.bool_]
    labels: NDArray[np.int64]
    training: int
    tiles: NDArray[np.float32]
    is_key_tile: NDArray[np.bool_]


class LabelledChunks(MILDataset):
    """A cohort whose chunks without a key instance are labelled negative; `is_key (bags, patches)` says which patches
    are.
    """

    is_key: NDArray[np.bool_]

    def _chunks(self, slide: int, rng: np.random.Generator, per_slide: float) -> list[Chunk]:
        is_key = torch.from_numpy(self.is_key[slide])
        chunks = super()._chunks(slide, rng, per_slide)
        return [replace(chunk, label=int(take(is_key, chunk.cut).any())) for chunk in chunks]


def draw_bags(
    features: NDArray[np.float64],
    classes: NDArray[np.int64],
    patches: int,
    keys: int,
    counts: tuple[int, int],
    seed: int,
) -> Bags:
    """Return so many training and test bags of tiles with `features (5000, D)` and `classes (5000,)`: every other bag
    has `keys` tumour tiles. Training and test bags share no tile.
    """
    rng = np.random.default_rng(derive_seed(seed, "needles"))
    scaled, parts = split_tiles(features, classes, rng)
    drawn = []
    for tiles, count in zip(parts, counts, strict=True):
        tumour, others = tiles[classes[tiles] == TUMOUR], tiles[classes[tiles] != TUMOUR]
        for number in range(count):
            of_tumour = keys if number % 2 else 0
            chosen = [rng.choice(tumour, of_tumour, replace=False), rng.choice(others, patches - of_tumour)]
            drawn.append(rng.permutation(np.concatenate(chosen)))
    is_key = np.stack([classes[chosen] == TUMOUR for chosen in drawn])
    labels = np.array([int(of_bag.any()) for of_bag in is_key])
    features_of_bags = [scaled[chosen] for chosen in drawn]
    return Bags(features_of_bags, is_key, labels, counts[0], scaled[parts[0]], classes[parts[0]] == TUMOUR)


def without_key(patches: int, keys: int, chunk_size: int | None) -> float:
    """Return the chance that a chunk of a positive bag has no key instance."""
    if chunk_size is None or chunk_size >= patches:
        return 0.0
    left_out = patches - patches / -(-patches // chunk_size)  # chunks of a bag are of one size
    return float(np.prod([max(0.0, left_out - taken) / (patches - taken) for taken in range(keys)]))


def opened(folder: Path, bags: Bags, way: Way) -> MILDataset:
    """Return the bags, which are written in a folder, as the cohort of a way of training."""
    kind = LabelledChunks if way.true_labels else MILDataset
    mode = "full" if way.chunk_size is None else "chunked"
    dataset = kind(folder / "labels.csv", folder / "features", CLASSES, mode, way.chunk_size or CHUNK_SIZE, cache="ram")
    if isinstance(dataset, LabelledChunks):
        dataset.is_key = bags.is_key
    return dataset


def trained(name: str, dataset: MILDataset, bags: NDArray[np.int64], settings: Training, seed: int) -> ModelTraining:
    factory = partial(build_mil, name, input_dim=dataset.input_dim, num_classes=2)
    training = ModelTraining(factory, dataset, bags, settings, derive_seed(seed, name), torch.device("cpu"))
    for epoch in range(1, settings.epochs + 1):
        training.epoch(epoch)
    training.with_reference(training.weights())
    return training


def measured(name: str, dataset: MILDataset, bags: Bags, settings: Training, seed: int) -> dict[str, float]:
    """Train a model on the training bags, and return its figures on the test bags, its steps and the megabytes of a
    step's features.
    """
    train = np.arange(bags.training)
    training = trained(name, dataset, train, settings, seed)
    batch = next(iter(dataset.batches(train, settings.batch_size, seed)))
    size = sum(bag.nbytes for bag in batch.bags) / 1e6
    feed = SlideFeed.of_mode(dataset.mode, dataset.chunk_size)
    return {"steps": training.steps, "MB": size} | tested(training.model.eval(), dataset, bags, feed)


def tested(model: BagModel, dataset: MILDataset, bags: Bags, feed: SlideFeed) -> dict[str, float]:
    """Return the figures of a model on the test bags."""
    found: dict[str, list[float]] = {}
    scores, whole_scores = [], []
    test = np.arange(bags.training, len(dataset))
    for bag in test:
        features, is_key = dataset.features(bag), bags.is_key[bag]
        output = predict_features(dataset.task, model, features, feed, attention=True, evidence=True)
        whole = output if feed == WHOLE else predict_features(dataset.task, model, features, WHOLE)
        scores.append(output.probabilities[1])
        whole_scores.append(whole.probabilities[1])
        if bags.labels[bag]:
            for kind, values in maps_by_class(output.attention, output.evidence).items():
                found.setdefault(f"top 10, {kind}", []).append(recall_of_top(values[1], is_key))
                found.setdefault(f"key AUC, {kind}", []).append(auc(is_key.astype(np.int64), values[1]))
    labels = bags.labels[test]
    of_bags = {"bag AUC": auc(labels, np.array(scores)), "bag AUC, whole": auc(labels, np.array(whole_scores))}
    return of_bags | {figure: float(np.mean(values)) for figure, values in found.items()}


def told(bags: Bags, seed: int) -> dict[str, float]:
    """Return the figures of a classifier that learns the class of every training tile, on the positive test bags."""
    classifier = MLPClassifier(64, early_stopping=True, random_state=derive_seed(seed, "told") % 2**32)
    classifier.fit(bags.tiles, bags.is_key_tile)
    recalls, key_aucs = [], []
    for features, is_key in zip(bags.features[bags.training :], bags.is_key[bags.training :], strict=True):
        if is_key.any():
            values = np.asarray(classifier.predict_proba(features))[:, 1]
            recalls.append(recall_of_top(values, is_key))
            key_aucs.append(auc(is_key.astype(np.int64), values))
    return {"top 10, evidence": float(np.mean(recalls)), "key AUC, evidence": float(np.mean(key_aucs))}


def recall_of_top(values: NDArray, is_key: NDArray[np.bool_]) -> float:
    """Return how many of the 10 patches of greatest value `(N,)` are key instances, as a share of the most that could
    be.
    """
    top = np.argsort(values, kind="stable")[::-1][:TOP]
    return float(is_key[top].sum() / min(TOP, is_key.sum()))


def ways_of(chunk_sizes: Iterable[int], batch_sizes: Iterable[int]) -> list[Way]:
    """Return the ways of training that are compared."""
    chunked = [Way(size, true_labels) for size in chunk_sizes for true_labels in (False, True)]
    return [*chunked, Way(None), *(Way(None, batch_size=size) for size in batch_sizes)]


def row_of(patches: int, keys: int, name: str, way: Way | None, seeds: Sequence[dict[str, float]]) -> list[str]:
    """Return the row of a model's trainings, or of the classifier of tiles (no way), from the figures of each seed."""
    cells = [
        mean_and_spread([figures[figure] for figures in seeds]) if figure in seeds[0] else "-" for figure in FIGURES
    ]
    if way is None:
        return [f"{patches}, {keys}, {name}", "-", "-", "-", *cells]
    share = f"{100 * without_key(patches, keys, way.chunk_size):.1f}%"
    training = [f"{seeds[0]['steps']:.0f}", share, f"{seeds[0]['MB']:.1f}"]
    return [f"{patches}, {keys}, {name}, {way.name}", *training, *cells]


def asked() -> argparse.Namespace:
    description, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="kather5000_best3_49feat.mat")
    parser.add_argument("--models", nargs="+", default=["LiteMIL"], metavar="NAME", help="with attention")
    parser.add_argument("--patches", nargs="+", type=int, default=[2000], metavar="N", help="patches in a bag")
    parser.add_argument("--keys", nargs="+", type=int, default=[10, 30], metavar="N", help="in a positive bag")
    parser.add_argument("--chunk_sizes", nargs="+", type=int, default=[100, CHUNK_SIZE], metavar="N")
    parser.add_argument("--batch_sizes", nargs="*", type=int, default=[], metavar="N", help="also whole bags in these")
    parser.add_argument("--bags", nargs=2, type=int, default=[100, 100], metavar="N", help="for training and for test")
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    return parser.parse_args()


def main() -> None:
    arguments = asked()
    tiles = read_tiles(arguments.source)
    ways = ways_of(arguments.chunk_sizes, arguments.batch_sizes)
    found: dict[tuple[int, int, str, Way | None], list[dict[str, float]]] = {}
    draws = [(n, keys, seed) for n in arguments.patches for keys in arguments.keys for seed in arguments.seeds]
    for patches, keys, seed in progress(draws, "Cohorts", unit="cohort"):
        bags = draw_bags(*tiles, patches, keys, tuple(arguments.bags), seed)
        found.setdefault((patches, keys, "told", None), []).append(told(bags, seed))
        with tempfile.TemporaryDirectory() as folder:
            written(bags.features, bags.labels, Path(folder))
            for name in arguments.models:
                for way in ways:
                    settings = Training(epochs=arguments.epochs, batch_size=way.batch_size, standardize="off")
                    figures = measured(name, opened(Path(folder), bags, way), bags, settings, seed)
                    found.setdefault((patches, keys, name, way), []).append(figures)
    print(f"{', '.join([processor(), *versions()])}; seeds {', '.join(map(str, arguments.seeds))}\n")
    print(table(HEADING, [row_of(*cell, seeds) for cell, seeds in found.items()]))


if __name__ == "__main__":
    main()
