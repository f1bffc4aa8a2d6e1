"""Do maps find what the label is about? Bags with known key instances, as a Markdown table.

    uv run benchmarks/key_instances.py kather5000_best3_49feat.mat
    uv run benchmarks/key_instances.py kather5000_best3_49feat.mat --models LiteMIL ABMIL --seeds 1
    uv run benchmarks/key_instances.py malaria --positive infected

Tiles (a .mat file). They are those of Kather et al. 2016 (https://doi.org/10.1038/srep27988, CC BY): 5000 of colorectal
tissue, 625 of each of eight classes, as 49 texture features each; the file is that of the authors' code. A bag has 30
tiles. In a positive one 2 to 5 are tumour, in a negative one none; the others are of the seven other classes at random.
For each seed the tiles are split, class by class, 300 bags for training are drawn from 70% of them and 100 for testing
from the others, half of them positive; features are standardised by the training tiles. Of the training bags, a fifth
chooses the epoch. All figures are means over the seeds with their standard deviation.

A cohort (a folder with labels.csv and features/, whose files hold inst_labels, 1 for a key instance). Every slide is
predicted out of fold by a nested cross-validation with train.py's settings, 5 outer and 2 inner folds. Means are over
the slides, with 95% intervals over patients.

map         attention, or the evidence for the class of the key instances (for deletion: for the predicted class), or
            leave one out (tiles): how much the log-odds of that class fall without the instance
bags AUC    of the bag label, on the test bags
key AUC     in a bag with key instances, how often one has a greater value than another instance, ties counted half
against     the share of the key instances that argue against their bag's label: their value is below 0 (tiles)
agreed      of the key instances whose evidence is below 0, the share without which the bag is surer (tiles)
pointing    in how many of these bags the instance with the greatest value is a key instance (cohorts)
overlap     of the n greatest values, the share of key instances, where n instances are key (cohorts); by chance it is
            their share of all
deletion    `--faithfulness` on the test bags that are predicted right, by class: how much faster the probability of the
            predicted class falls as instances are taken away, those of the greatest values first, than in random orders
beaten      the share of the random orders that it beats
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from report import processor, table, versions

from MILS import build_mil, list_mils
from MILS.bag_model import BagModel
from utils.bags.instance_labels import read_instance_labels
from utils.bags.label_table import read_table
from utils.bags.store import Bag, write_bag
from utils.core.files import write_text
from utils.core.runtime import derive_seed, progress
from utils.evaluation.localization import SCORES, map_scores, mean_scores
from utils.learning.early_stopping import EarlyStopping
from utils.learning.settings import Training
from utils.learning.training import fit
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation
from utils.prediction.evidence import Evidence
from utils.prediction.faithfulness import measure_faithfulness
from utils.prediction.forward_pass import SlideFeed, predict_features
from utils.prediction.predictor import SlidePredictor
from utils.tasks.task import Task

TILES, TRAINING_BAGS, TEST_BAGS = 30, 300, 100
LEAST_KEYS, MOST_KEYS = 2, 5
TRAINING_SHARE, VALIDATION_BAGS = 0.7, 60
TUMOUR = 1  # of the file's eight classes
CLASSES = ("other", "tumour")
MAPS = ("attention", "evidence")
SETTINGS = Training(epochs=100, patience=20, batch_size=16, lr=3e-4)
WHOLE = SlideFeed(None, "merge")


def read_tiles(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features `(5000, 49)` and classes `(5000,)`, from 1 to 8."""
    content = scipy.io.loadmat(path)
    return content["source_array"].T.astype(np.float64), content["target_array"].argmax(axis=0) + 1


def split_tiles(
    features: NDArray[np.float64], classes: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.float32], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the features `(5000, D)`, standardised by the training tiles, and the numbers of the training and of the
    test tiles, split class by class.
    """
    parts: tuple[list[NDArray], list[NDArray]] = ([], [])
    for one in np.unique(classes):
        mixed = rng.permutation(np.flatnonzero(classes == one))
        cut = round(len(mixed) * TRAINING_SHARE)
        parts[0].append(mixed[:cut])
        parts[1].append(mixed[cut:])
    train, test = map(np.concatenate, parts)
    mean, spread = features[train].mean(axis=0), features[train].std(axis=0)
    scaled = ((features - mean) / np.where(spread > 0, spread, 1)).astype(np.float32)
    return scaled, (train, test)


def draw_bags(
    features: NDArray[np.float64],
    classes: NDArray[np.int64],
    seed: int,
    training_bags: int = TRAINING_BAGS,
    test_bags: int = TEST_BAGS,
) -> tuple[list[NDArray[np.float32]], NDArray[np.bool_], NDArray[np.int64]]:
    """Bags `(30, 49)`, the training ones first; of each tile whether it is a key instance `(bags, 30)`; of each bag
    its label. Training and test bags share no tile.
    """
    rng = np.random.default_rng(derive_seed(seed, "key instances"))
    scaled, parts = split_tiles(features, classes, rng)
    bags, keys, labels = [], [], []
    for tiles, count in zip(parts, (training_bags, test_bags), strict=True):
        tumour, others = tiles[classes[tiles] == TUMOUR], tiles[classes[tiles] != TUMOUR]
        for number in range(count):
            positive = number % 2
            of_tumour = int(rng.integers(LEAST_KEYS, MOST_KEYS + 1)) if positive else 0
            chosen = np.concatenate(
                [rng.choice(tumour, of_tumour, replace=False), rng.choice(others, TILES - of_tumour, replace=False)]
            )
            chosen = rng.permutation(chosen)
            bags.append(scaled[chosen])
            keys.append(classes[chosen] == TUMOUR)
            labels.append(positive)
    return bags, np.stack(keys), np.array(labels)


def written(bags: Sequence[NDArray[np.float32]], labels: NDArray[np.int64], folder: Path) -> MILDataset:
    lines = ["case_id,wsi_id,label"]
    for number, (bag, label) in enumerate(zip(bags, labels, strict=True)):
        write_bag(folder / "features" / f"bag_{number}.h5", Bag(bag))
        lines.append(f"{number},bag_{number},{CLASSES[label]}")
    write_text(folder / "labels.csv", "\n".join(lines) + "\n")
    return MILDataset(folder / "labels.csv", folder / "features", CLASSES, mode="full", cache="ram")


def trained(name: str, dataset: MILDataset, seed: int) -> BagModel:
    factory = partial(build_mil, name, input_dim=dataset.input_dim, num_classes=2)
    bags = np.arange(TRAINING_BAGS)
    stopping = EarlyStopping(dataset.task, bags[-VALIDATION_BAGS:], WHOLE, "slide_auc")
    kept = fit(
        factory, dataset, bags[:-VALIDATION_BAGS], stopping, SETTINGS,
        seed=derive_seed(seed, name), device=torch.device("cpu"),
    )  # fmt: skip
    model = factory()
    model.load_state_dict(kept.state_dict)
    return model.eval()


def measured(name: str, dataset: MILDataset, keys: NDArray[np.bool_], seed: int) -> dict[str, dict[str, float]]:
    """Return the figures of each map of a model on the test bags."""
    model, test = trained(name, dataset, seed), np.arange(TRAINING_BAGS, TRAINING_BAGS + TEST_BAGS)
    outputs = [
        predict_features(dataset.task, model, dataset.features(bag), WHOLE, attention=True, evidence=True)
        for bag in test
    ]
    labels, probabilities = dataset.labels[test], np.stack([output.probabilities for output in outputs])
    bags_auc = dataset.task.unweighted_metrics(labels, probabilities)["auc"]
    assert bags_auc is not None  # noqa: S101 - both labels occur
    found: dict[str, dict[str, list[float]]] = {}
    for bag, output, label in zip(test, outputs, labels, strict=True):
        maps = maps_by_class(output.attention, output.evidence)
        maps["leave one out"] = left_out(dataset.task, model, dataset.features(bag))
        for kind, values in maps.items():
            figures = found.setdefault(kind, {})
            if label:
                auc = map_scores(values[1], keys[bag])["auc"]
                figures.setdefault("key AUC", []).append(np.nan if auc is None else auc)
                is_against = keys[bag] & (values[1] < 0)
                if kind != "attention":
                    figures.setdefault("against", []).append(is_against.sum() / keys[bag].sum())
                if kind == "evidence":
                    figures.setdefault("agreed", []).extend(maps["leave one out"][1, is_against] < 0)
            if output.probabilities.argmax() == label:
                features, orders = dataset.features(bag), values[label]
                curve = measure_faithfulness(dataset.task, [model], features, orders, int(label), seed).as_dict()
                side, deletion = ("negative", "positive")[label], curve["deletion"]
                if deletion["gap"] is None:  # a map in which all tiles are equal
                    continue
                beaten = deletion["random_orders_beaten"] / curve["random_orders"]
                figures.setdefault(f"deletion, {side}", []).append(deletion["gap"])
                figures.setdefault(f"beaten, {side}", []).append(beaten)
    return {
        kind: {"bags AUC": bags_auc} | {name: float(np.mean(values)) for name, values in figures.items() if values}
        for kind, figures in found.items()
    }


def maps_by_class(attention: NDArray | None, evidence: Evidence | None) -> dict[str, NDArray]:
    """Return each map `(C, N)`, by class; attention is the same for both classes."""
    maps = {}
    if attention is not None:
        maps["attention"] = np.repeat(attention.mean(axis=0, keepdims=True), 2, axis=0)
    if evidence is not None:
        maps["evidence"] = evidence.contributions
    return maps


def left_out(task: Task, model: BagModel, features: torch.Tensor) -> NDArray:
    """Return by how much each signal of a bag falls without each of its instances, `(C, N)`."""
    count = len(features)
    kept = torch.arange(count).expand(count, count)[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)

    def signals(bags: torch.Tensor) -> NDArray:
        with torch.inference_mode():
            logits = model(bags)[0].double()
        return np.stack([task.signals(one[None], torch.ones(1, dtype=torch.float64)).numpy() for one in logits], axis=1)

    return signals(features[None].float()) - signals(features[kept].float())


def out_of_fold(name: str, home: Path, positive: str, folder: Path) -> list[list[str]]:
    """Return the rows of a model on a cohort: cross-validate it, then score each slide's maps by its fold's model."""
    classes = sorted(set(read_labels(home)) - {positive})
    dataset = MILDataset(home / "labels.csv", home / "features", (*classes, positive), cache="ram")
    factory = partial(build_mil, name, input_dim=dataset.input_dim, num_classes=2)
    outputs = NestedCrossValidation(
        factory, dataset, dataset.class_names, folder, n_outer=5, n_inner=2, device="cpu"
    ).run()
    entries, cases = [], []
    for fold in json.loads((folder / "splits.json").read_text())["folds"]:
        predictor = SlidePredictor(folder / f"fold_{fold['fold']}_best.pth", device="cpu")
        for row in [row for row in dataset.rows if row.wsi_id in set(fold["test"])]:
            is_key = read_instance_labels(row.path) > 0
            found = predictor.predict_bag(predictor.bag(row.path), row.path, evidence=True)
            maps = maps_by_class(found.attention, found.evidence)
            scores = {kind: map_scores(values[1], is_key) for kind, values in maps.items()}
            counts = {"patches": int(is_key.sum()), "of": len(is_key)}
            entries.append({"classes": {positive: counts | scores}})
            cases.append(row.case_id)
    means = mean_scores(entries, cases, derive_seed(0, "bootstrap"))[positive]
    bags = _with_interval(outputs["pooled"]["auc"], outputs["intervals_95"]["auc"])
    chance = f"{means['chance_overlap']:.3f}"
    return [
        [name, kind, bags]
        + [_with_interval(means[kind][score], means[kind]["intervals_95"][score]) for score in SCORES]
        + [chance]
        for kind in MAPS
        if kind in means
    ]


def read_labels(home: Path) -> list[str]:
    return [row["label"] for row in read_table(home / "labels.csv").rows]


def main() -> None:
    description, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="kather5000_best3_49feat.mat, or the folder of a cohort")
    parser.add_argument("--models", nargs="+", default=list_mils(), metavar="NAME")
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="how often tiles are drawn and models trained"
    )
    parser.add_argument("--positive", metavar="CLASS", help="the class of a cohort's key instances")
    asked = parser.parse_args()
    if asked.source.is_dir():
        if asked.positive not in read_labels(asked.source):
            parser.error(
                f"--positive {asked.positive}: give one of {', '.join(sorted(set(read_labels(asked.source))))}"
            )
        of_cohort(asked.source, asked.positive, asked.models)
    else:
        of_tiles(asked.source, asked.models, asked.seeds)


def of_tiles(path: Path, models: Sequence[str], seeds: int) -> None:
    """Print the table of the tiles."""
    features, classes = read_tiles(path)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in progress(range(seeds), "Seeds", unit="seed"):
        bags, keys, labels = draw_bags(features, classes, seed)
        with tempfile.TemporaryDirectory() as folder:
            dataset = written(bags, labels, Path(folder))
            for name in models:
                for kind, figures in measured(name, dataset, keys, seed).items():
                    found.setdefault((name, kind), []).append(figures)
    names = ["bags AUC", "key AUC", "against", "agreed"]
    names += [f"{figure}, {side}" for figure in ("deletion", "beaten") for side in ("negative", "positive")]
    rows = [
        [*row, *[_cell([figures[name] for figures in each if name in figures]) for name in names]]
        for row, each in found.items()
    ]
    print(f"{processor()}, {', '.join(versions())}; {seeds} seeds\n")
    print(table(" | ".join(["model", "map", *names]), rows))


def of_cohort(home: Path, positive: str, models: Sequence[str]) -> None:
    """Print the table of a cohort."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            rows += out_of_fold(name, home, positive, Path(folder) / name)
    print(f"{processor()}, {', '.join(versions())}; {home.name}, key instances of {positive}\n")
    print(table("model | map | bags AUC | key AUC | pointing | overlap | chance overlap", rows))


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or interval is None:
        return "-" if value is None else f"{value:.3f}"
    return f"{value:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"


if __name__ == "__main__":
    main()
