"""Does attention find what the label is about? Bags of real tissue tiles with known key instances, as a Markdown table.

    uv run benchmarks/key_instances.py kather5000_best3_49feat.mat
    uv run benchmarks/key_instances.py kather5000_best3_49feat.mat --models LiteMIL ABMIL --seeds 1

The tiles are those of Kather et al. 2016 (https://doi.org/10.1038/srep27988, CC BY): 5000 of colorectal tissue, 625 of
each of eight classes, as 49 texture features each; the file is that of the authors' code. A bag has 30 tiles. In a
positive one 2 to 5 are tumour, in a negative one none; the others are of the seven other classes at random. For each
seed the tiles are parted, class by class, 300 bags for training are drawn from 70% of them and 100 for testing from the
others, half of them positive; features are standardised by the training tiles. Of the training bags, a fifth chooses
the epoch.

bags AUC        of the bag label, on the test bags
key AUC         how well attention ranks the tumour tiles of a positive test bag above its other tiles: the area under
                the ROC curve within each bag, the mean over them
deletion,       `--faithfulness` on the positive test bags that are told right: by how much the mean probability falls
insertion       faster (rises faster) as the most attended tiles are taken away (added) first, against random orders
beats random    in how many of these bags it does so, of both together

All are means over the seeds with their standard deviation.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from report import processor, table, versions
from scipy.stats import rankdata

from MILS import build_mil, list_mils
from MILS.bag_model import BagModel
from utils.bags.store import Bag, write_bag
from utils.core.files import write_text
from utils.core.runtime import derive_seed, progress
from utils.learning.early_stopping import EarlyStopping
from utils.learning.settings import Training
from utils.learning.training import fit
from utils.mil_dataset import MILDataset
from utils.prediction.faithfulness import measure_faithfulness
from utils.prediction.forward_pass import SlideFeed, predict_features

TILES, TRAINING_BAGS, TEST_BAGS = 30, 300, 100
LEAST_KEYS, MOST_KEYS = 2, 5
TRAINING_SHARE, VALIDATION_BAGS = 0.7, 60
TUMOUR = 1  # of the file's eight classes
CLASSES = ("other", "tumour")
SETTINGS = Training(epochs=100, patience=20, batch_size=16, lr=3e-4)
WHOLE = SlideFeed(None, "merge")


def read_tiles(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features `(5000, 49)` and classes `(5000,)`, from 1 to 8."""
    content = scipy.io.loadmat(path)
    return content["source_array"].T.astype(np.float64), content["target_array"].argmax(axis=0) + 1


def draw_bags(
    features: NDArray[np.float64], classes: NDArray[np.int64], seed: int
) -> tuple[list[NDArray[np.float32]], NDArray[np.bool_], NDArray[np.int64]]:
    """Bags `(30, 49)`, the training ones first; of each tile whether it is a key instance `(bags, 30)`; of each bag
    its label. Training and test bags share no tile.
    """
    rng = np.random.default_rng(derive_seed(seed, "key instances"))
    parts: list[list[NDArray]] = [[], []]
    for one in np.unique(classes):
        mixed = rng.permutation(np.flatnonzero(classes == one))
        cut = round(len(mixed) * TRAINING_SHARE)
        parts[0].append(mixed[:cut])
        parts[1].append(mixed[cut:])
    train = np.concatenate(parts[0])
    mean, spread = features[train].mean(axis=0), features[train].std(axis=0)
    scaled = ((features - mean) / np.where(spread > 0, spread, 1)).astype(np.float32)
    bags, keys, labels = [], [], []
    for tiles, count in zip(map(np.concatenate, parts), (TRAINING_BAGS, TEST_BAGS), strict=True):
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
    kept = fit(
        factory, dataset, bags[:-VALIDATION_BAGS], EarlyStopping(bags[-VALIDATION_BAGS:], WHOLE, "slide_auc"), SETTINGS,
        seed=derive_seed(seed, name), device=torch.device("cpu"),
    )  # fmt: skip
    model = factory()
    model.load_state_dict(kept.state_dict)
    return model.eval()


def key_auc(attention: NDArray, keys: NDArray[np.bool_]) -> float:
    """How often a key instance is attended to more than another one, ties counted half."""
    ranks, count = rankdata(attention), int(keys.sum())
    return float((ranks[keys].sum() - count * (count + 1) / 2) / (count * (len(keys) - count)))


def measured(name: str, dataset: MILDataset, keys: NDArray[np.bool_], seed: int) -> dict[str, float]:
    model, test = trained(name, dataset, seed), range(TRAINING_BAGS, TRAINING_BAGS + TEST_BAGS)
    outputs = {bag: predict_features(dataset.task, model, dataset.features(bag), WHOLE, attention=True) for bag in test}
    labels = dataset.labels[list(test)]
    probabilities = np.stack([outputs[bag].probabilities for bag in test])
    aucs, gaps = [], []
    for bag in test:
        weights = outputs[bag].attention
        if weights is None or not dataset.labels[bag]:
            continue
        attention = weights.mean(axis=0)
        aucs.append(key_auc(attention, keys[bag]))
        if outputs[bag].probabilities.argmax() == 1:
            found = measure_faithfulness(dataset.task, [model], dataset.features(bag), attention, 1, seed).as_dict()
            gaps.append((found["deletion"]["gap"], found["insertion"]["gap"]))
    gaps = np.array(gaps)
    bags_auc = dataset.task.unweighted_metrics(labels, probabilities)["auc"]
    assert bags_auc is not None  # noqa: S101 - both labels occur
    return {
        "bags AUC": bags_auc,
        "key AUC": float(np.mean(aucs)),
        "deletion": float(gaps[:, 0].mean()),
        "insertion": float(gaps[:, 1].mean()),
        "beats random": float((gaps.sum(axis=1) > 0).mean()),
    }


def main() -> None:
    description, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="kather5000_best3_49feat.mat")
    parser.add_argument("--models", nargs="+", default=list_mils(), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how often all is drawn and trained anew")
    asked = parser.parse_args()
    features, classes = read_tiles(asked.file)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in asked.models}
    for seed in progress(range(asked.seeds), "Seeds", unit="seed"):
        bags, keys, labels = draw_bags(features, classes, seed)
        with tempfile.TemporaryDirectory() as folder:
            dataset = written(bags, labels, Path(folder))
            for name in asked.models:
                found[name].append(measured(name, dataset, keys, seed))
    names = list(next(iter(found.values()))[0])
    rows = [[name, *[_cell([one[figure] for one in each]) for figure in names]] for name, each in found.items()]
    print(f"{processor()}, {', '.join(versions())}; {asked.seeds} seeds\n")
    print(table(" | ".join(["model", *names]), rows))


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
