"""Which epoch of a training is best kept, and which learning rate does well? Every epoch's answers, recorded once.

    uv run benchmarks/defaults.py malaria tiger.npz --models LiteMIL ABMIL --lr 1e-4 3e-4
    uv run benchmarks/defaults.py kather5000_best3_49feat.mat --bags 60 240 --seeds 1 2 3

A source is a folder with labels.csv and features/, a classic benchmark (see classic.py), or the tiles of
key_instances.py, of which bags are drawn anew for each seed, as it says. Each training runs to its end, and after each
of its epochs its validation and test slides are predicted. What a rule would have given is then read from these
answers, so that all rules are compared on the same trainings:

old   the best epoch by validation, where training stops 10 epochs after it
new   what train.py does by default
last  the last epoch
grid  as new, at the learning rate that does best in each outer fold's inner validation (where several are given)

"best" tests the best inner model, "ensemble" the mean of the inner models; AUC and accuracy are means over outer folds
and seeds, "±" is the standard deviation over seeds.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from classic import write_cohort
from key_instances import draw_bags, read_tiles, written
from numpy.typing import NDArray
from report import processor, table, versions

from MILS import build_mil
from utils.core.runtime import derive_seed
from utils.learning.protocol import MANY_VALIDATED
from utils.learning.settings import Training
from utils.learning.splits import nested_splits
from utils.learning.training import ModelTraining
from utils.mil_dataset import MILDataset
from utils.prediction.forward_pass import SlideFeed, predict_values
from utils.tasks.metrics import log_loss


@dataclass
class Trajectory:
    """The values `(epochs, slides, 2)` of a training's validation and test slides after each epoch, their labels, and
    the class weights of its loss.
    """

    val: NDArray[np.float64]
    test: NDArray[np.float64]
    val_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]
    loss_weights: NDArray[np.float64]

    @functools.cached_property
    def ranks(self) -> list[tuple[float, float]]:
        """Return the rank of each epoch: its validation AUC, then its loss."""
        return [
            (auc(self.val_labels, values[:, 1]), -log_loss(self.val_labels, values, self.loss_weights))
            for values in self.val
        ]


def auc(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """Return how often a positive slide scores higher than a negative one, ties counted half."""
    differences = scores[labels == 1][:, None] - scores[labels == 0][None]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


Rule = Callable[[Trajectory], int]


def last_epoch(trajectory: Trajectory) -> int:
    return len(trajectory.val) - 1


def best_epoch(trajectory: Trajectory, patience: int, least: int = 1, *, later: bool = False) -> int:
    """Return the best epoch (from 0) by validation, of those from the `least` (counted from 1) on, where training stops
    after `patience` epochs without a better one. `later`: of equal AUCs, that of the later epoch counts as better.
    """
    best = least - 1
    for epoch in range(least, len(trajectory.val)):
        rank, so_far = trajectory.ranks[epoch], trajectory.ranks[best]
        is_better = rank[0] >= so_far[0] if later else rank > so_far
        if is_better:
            best = epoch
        elif epoch - best >= patience:
            break
    return best


def old_rule(trajectory: Trajectory) -> int:
    """Return the epoch that was kept by default before: the best, where training stops after 10 without a better."""
    return best_epoch(trajectory, patience=10)


def new_rule(trajectory: Trajectory) -> int:
    """Return the epoch that is kept by default, if an epoch takes 8 steps."""
    if np.bincount(trajectory.val_labels, minlength=2).min() < MANY_VALIDATED:
        return last_epoch(trajectory)
    return best_epoch(trajectory, Training.patience, -(-Training.least_steps // 8), later=True)


RULES: dict[str, Rule] = {"old": old_rule, "new": new_rule, "last": last_epoch}
FIGURES = ("best, AUC", "best, accuracy", "ensemble, AUC", "ensemble, accuracy")


Folds = Sequence[Sequence[Trajectory]]  # of each outer fold its inner trainings


def figures_of(folds: Folds, rule: Rule) -> dict[str, float]:
    """Return test AUC and accuracy, means over outer folds, of the best inner model and of the inner models' mean."""
    found: dict[str, list[float]] = {}
    for inner in folds:
        epochs = [rule(trajectory) for trajectory in inner]
        ranks = [trajectory.ranks[epoch] for trajectory, epoch in zip(inner, epochs, strict=True)]
        tested = [trajectory.test[epoch] for trajectory, epoch in zip(inner, epochs, strict=True)]
        labels = inner[0].test_labels
        for final, values in {"best": tested[ranks.index(max(ranks))], "ensemble": np.mean(tested, axis=0)}.items():
            found.setdefault(f"{final}, AUC", []).append(auc(labels, values[:, 1]))
            found.setdefault(f"{final}, accuracy", []).append(float((values.argmax(axis=1) == labels).mean()))
        found.setdefault("epoch", []).append(float(np.mean(epochs)) + 1)
    return {name: float(np.mean(values)) for name, values in found.items()}


def trajectory(
    dataset: MILDataset, model: str, settings: Training, train: NDArray, val: NDArray, test: NDArray, seed: int
) -> Trajectory:
    factory = functools.partial(build_mil, model, input_dim=dataset.input_dim, num_classes=2)
    training = ModelTraining(factory, dataset, train, settings, seed, torch.device("cpu"))
    feed = SlideFeed.of_mode(dataset.mode, dataset.chunk_size, dataset.sequential)
    slides = np.concatenate([val, test])
    values = []
    for epoch in range(1, settings.epochs + 1):
        training.epoch(epoch)
        features = (dataset.features(int(slide)) for slide in slides)
        values.append(predict_values(dataset.task, training.model, features, feed))
    whole, labels = np.stack(values), dataset.labels
    return Trajectory(whole[:, : len(val)], whole[:, len(val) :], labels[val], labels[test], training.loss_weights)


def best_rates(folds_of_rates: Sequence[Folds], rule: Rule) -> list[Sequence[Trajectory]]:
    """Return the trainings of the learning rate that does best in inner validation, chosen in each outer fold."""

    def inner_rank(trainings: Sequence[Trajectory]) -> tuple[float, ...]:
        return tuple(np.mean([training.ranks[rule(training)] for training in trainings], axis=0))

    return [max(rates, key=inner_rank) for rates in zip(*folds_of_rates, strict=True)]


def trajectories(
    dataset: MILDataset, model: str, settings: Training, seed: int, n_outer: int, n_inner: int
) -> list[list[Trajectory]]:
    """Return the trajectories of each outer fold's inner trainings."""
    folds = nested_splits(dataset.labels, dataset.groups, dataset.class_names, n_outer, n_inner, seed)
    return [
        [
            trajectory(
                dataset, model, settings, inner.train, inner.val, fold.test, derive_seed(seed, fold.number, number)
            )
            for number, inner in enumerate(fold.inner, start=1)
        ]
        for fold in folds
    ]


def datasets(source: Path, bags: Sequence[int], seed: int, folder: Path) -> Iterator[tuple[str, MILDataset]]:
    """Yield the cohorts of a source with their names: a single one, or one of tiles for each number of bags."""
    if source.is_dir():
        yield source.name, MILDataset(source / "labels.csv", source / "features", cache="ram")
    elif source.suffix == ".npz":
        yield source.stem, MILDataset(*write_cohort(folder / source.stem, source), cache="ram")
    else:
        tiles = read_tiles(source)
        for count in bags:
            drawn, _, labels = draw_bags(*tiles, seed, training_bags=count, test_bags=0)
            yield f"tiles, {count}", written(drawn, labels, folder / str(count))


def rows_of(name: str, by_rate: Mapping[float, Sequence[Folds]]) -> list[list[str]]:
    """Return the rows of a cohort and model from the folds of each learning rate, a list of seeds."""
    choices: dict[str, tuple[Sequence[Folds], Rule]] = {
        f"{lr:g}, {rule}": (seeds, RULES[rule]) for lr, seeds in by_rate.items() for rule in RULES
    }
    if len(by_rate) > 1:
        grids = [best_rates(rates, new_rule) for rates in zip(*by_rate.values(), strict=True)]
        choices["grid"] = (grids, new_rule)
    rows = []
    for choice, (seeds, rule) in choices.items():
        each = [figures_of(folds, rule) for folds in seeds]
        cells = [mean_and_spread([figures[figure] for figures in each]) for figure in FIGURES]
        rows.append([f"{name}, {choice}", f"{statistics.mean(figures['epoch'] for figures in each):.0f}", *cells])
    return rows


def mean_and_spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    description, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE")
    parser.add_argument("--models", nargs="+", default=["LiteMIL"], metavar="NAME")
    parser.add_argument("--lr", nargs="+", type=float, default=[Training.lr])
    parser.add_argument("--bags", nargs="+", type=int, default=[60], metavar="N", help="bags drawn of tiles")
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="SEED")
    parser.add_argument("--n_outer", type=int, default=2)
    parser.add_argument("--n_inner", type=int, default=2)
    arguments = parser.parse_args()
    found: dict[str, dict[float, list[Folds]]] = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for source in arguments.sources:
                for cohort, dataset in datasets(source, arguments.bags, seed, Path(folder)):
                    for model in arguments.models:
                        for lr in arguments.lr:
                            settings = Training(lr=lr, epochs=arguments.epochs, standardize="off")
                            folds = trajectories(dataset, model, settings, seed, arguments.n_outer, arguments.n_inner)
                            found.setdefault(f"{cohort}, {model}", {}).setdefault(lr, []).append(folds)
    print(f"{', '.join([processor(), *versions()])}; seeds {', '.join(map(str, arguments.seeds))}\n")
    rows = [row for name, by_rate in found.items() for row in rows_of(name, by_rate)]
    print(table("cohort, model, learning rate, rule | epoch | best, AUC | accuracy | ensemble, AUC | accuracy", rows))


if __name__ == "__main__":
    main()
