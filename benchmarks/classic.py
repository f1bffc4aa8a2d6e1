"""The classic multiple-instance benchmarks, beside the accuracies that were published with attention pooling.

    uv run benchmarks/classic.py --data bags/ --output outputs/classic

`bags/` holds musk1.npz, tiger.npz and elephant.npz: X (instances, D), bag_index (instances,), bag_label (bags,). Each
becomes a cohort of feature files, its features standardised (by all instances, no label is looked at), and is cross-
validated with every model and seed: 10 outer folds, 3 inner ones, which choose the learning rate and stop the training;
the three inner models answer together. A run that is there is not done again, so that a killed benchmark goes on.
"""

import argparse
import functools
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from report import processor, table, versions

from MILS import build_mil
from utils.bags.store import Bag, write_bag
from utils.core.files import write_text
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation

# Accuracy of attention and of gated attention in ten-fold cross-validation: Ilse, Tomczak and Welling, Attention-based
# deep multiple instance learning, ICML 2018, https://arxiv.org/abs/1802.04712.
PUBLISHED = {"musk1": (0.892, 0.900), "tiger": (0.839, 0.845), "elephant": (0.868, 0.857)}
MODELS = ("ABMIL", "LiteMIL")
CLASSES = ("negative", "positive")
SETTINGS: dict[str, Any] = {
    "n_inner": 3, "patience": 15, "batch_size": 16, "final": "ensemble",
    "grid": {"lr": (3e-4, 1e-3)}, "device": "cpu",
}  # fmt: skip


def write_cohort(folder: Path, benchmark: Path, *, standardised: bool = True) -> tuple[Path, Path]:
    """Write a benchmark as a cohort: each bag is one slide of one patient, the classes are negative and positive.

    Returns `labels.csv` and the features folder.
    """
    with np.load(benchmark, allow_pickle=False) as file:
        instances, index, labels = (file[name] for name in ("X", "bag_index", "bag_label"))
    if standardised:
        spread = instances.std(axis=0)
        instances = (instances - instances.mean(axis=0)) / np.where(spread > 0, spread, 1)
    wsi_ids = [f"{benchmark.stem}-{number:03d}" for number in range(len(labels))]
    for number, wsi_id in enumerate(wsi_ids):
        target = folder / "features" / f"{wsi_id}.h5"
        if not target.exists():  # a run is known by its files' times
            write_bag(target, Bag(instances[index == number].astype(np.float32)))
    rows = [
        f"{wsi_id},{'positive' if label > 0 else 'negative'},{wsi_id}"
        for wsi_id, label in zip(wsi_ids, labels, strict=True)
    ]
    write_text(folder / "labels.csv", "\n".join(["wsi_id,label,case_id", *rows]) + "\n")
    return folder / "labels.csv", folder / "features"


def cross_validate(dataset: MILDataset, model: str, folder: Path, **settings: int) -> dict[str, Any]:
    factory = functools.partial(build_mil, model, input_dim=dataset.input_dim, num_classes=2)
    return NestedCrossValidation(factory, dataset, dataset.class_names, folder, **SETTINGS, **settings).run()


def report_row(benchmark: str, model: str, runs: list[dict[str, Any]]) -> list[str]:
    accuracies = [run["slide_accuracy_mean"] for run in runs]
    chosen = Counter(fold["selection"]["setting"]["lr"] for run in runs for fold in run["fold_results"])
    attention, gated = PUBLISHED[benchmark]
    return [
        f"{benchmark}, {model}",
        f"{statistics.mean(accuracies):.3f}",
        f"{min(accuracies):.3f} to {max(accuracies):.3f}",
        f"{statistics.mean(run['pooled']['auc'] for run in runs):.3f}",
        ", ".join(f"{lr:g} ({count})" for lr, count in sorted(chosen.items())),
        f"{attention:.3f} / {gated:.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .npz files")
    parser.add_argument("--output", type=Path, default=Path("outputs/classic"))
    parser.add_argument("--benchmarks", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED), metavar="NAME")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N")
    parser.add_argument("--n_outer", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    asked = parser.parse_args()
    rows = []
    for name in asked.benchmarks:
        dataset = MILDataset(*write_cohort(asked.output / name, asked.data / f"{name}.npz"), CLASSES, mode="full")
        for model in asked.models:
            runs = [
                cross_validate(
                    dataset,
                    model,
                    asked.output / name / f"{model}_{seed}",
                    n_outer=asked.n_outer,
                    epochs=asked.epochs,
                    seed=seed,
                )
                for seed in asked.seeds
            ]
            rows.append(report_row(name, model, runs))
            print(" | ".join(rows[-1]), flush=True)
    print(", ".join(["\n" + processor(), *versions(), f"seeds {', '.join(map(str, asked.seeds))}"]) + "\n")
    heading = "benchmark, model | accuracy | over seeds | pooled AUC | learning rates chosen (folds)"
    print(table(f"{heading} | published: attention / gated", rows))


if __name__ == "__main__":
    main()
