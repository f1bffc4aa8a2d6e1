"""A whole nested cross-validation of LiteMIL, the plain way and ours, as Markdown tables.

    uv run benchmarks/nested_cv.py
    uv run benchmarks/nested_cv.py --slides 40 --repeats 3 --jobs 2
    uv run benchmarks/nested_cv.py --device cuda --jobs 1 2 4

The cohort is synthetic. Each way runs in a fresh process, from the feature files (just written, so in the system's
cache) to the results on disk, one after the other, on the same folds and threads. Imports are not counted.

plain  Like the first version: torch's DataLoader over chunks of neighbouring patches. Every access opens the file,
       reads the coordinates too and converts to float32. Batches are padded to the longest chunk, with a mask. LiteMIL
       is made of nn.MultiheadAttention. Reading lengths opens every file, reading labels loads every chunk.
ours   MILDataset and NestedCrossValidation with their defaults, from an empty folder for the packed file, with figures,
       intervals and checkpoints.

Both use the same batch size, optimizer, schedule, class weights and clipping, validate after every epoch and test each
fold once. Before that, both train a small model from the same weights on the same chunks in the same order, without
dropout. The largest difference of their loss curves is printed: it shows that they compute the same function.

On a card (see `nested_cv_on_card.py`) only our way runs: epochs of one training, with features kept on the card and
sent there, and whole runs with several jobs.
"""

import argparse
import functools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import card
import numpy as np
import pandas as pd
import torch
from loading import LAYOUTS
from plain_training import PlainChunks, PlainTraining, plain
from references import PlainLiteMIL
from report import processor, table, versions
from torch import nn
from trained_cohort import CLASSES, SEED, SMALL, TASK, Cohort, Plan, write_cohort

from MILS import build_mil
from utils.bags.chunks import Batch
from utils.learning.splits import InnerFold
from utils.learning.training import ModelTraining, validate
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation
from utils.prediction.forward_pass import SlideFeed

WAYS = ("plain", "ours")


def ours(plan: Plan, folder: Path, output: Path) -> Iterator[str]:
    """Run the whole cross-validation our way, from an empty folder for the packed file; yield each finished part."""
    dataset = our_dataset(plan, folder, output.parent / f"{output.name}_packed")
    yield "before the first training"
    factory = functools.partial(build_mil, "LiteMIL", input_dim=plan.dim, num_classes=len(CLASSES))
    settings = {"jobs": plan.jobs} if plan.jobs > 1 else {}
    cv = NestedCrossValidation(
        factory, dataset, CLASSES, output, plan.n_outer, plan.n_inner, plan.batch_size, plan.epochs,
        patience=plan.epochs, device=plan.device, lr=plan.lr, seed=SEED, **settings,
    )  # fmt: skip
    cv.run()
    yield "from there to the results"


def our_dataset(plan: Plan, folder: Path, cache: Path, kind: type[MILDataset] = MILDataset, **options: Any) -> Any:
    csv, features = folder / "labels.csv", folder / "features"
    return kind(csv, features, CLASSES, chunk_size=plan.chunk_size, cache=cache, **options)


def clock() -> np.ndarray:
    """Return wall seconds, and processor seconds of this process and its ended children."""
    return np.array([time.perf_counter(), sum(os.times()[:4])])


def timed(way: str, plan: Plan, folder: Path, output: Path) -> dict[str, tuple[float, float]]:
    """Return wall and processor seconds of each part of a whole cross-validation, and of all."""
    torch.set_num_threads(plan.threads)
    torch.optim.AdamW([torch.zeros(1)])  # the first one imports half of PyTorch
    parts: dict[str, tuple[float, float]] = {}
    began = before = clock()
    for part in {"plain": plain, "ours": ours}[way](plan, folder, output):
        parts[part], before = tuple(clock() - before), clock()
    return parts | {"in all": tuple(before - began)}


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Pair:
    """One training both ways on one inner fold, epoch by epoch."""

    def __init__(self, plan: Plan, folder: Path, dataset: MILDataset, **model: Any) -> None:
        cohort = Cohort.of(folder)
        self.inner: InnerFold = cohort.folds(plan)[0].inner[0]
        self.dataset, self.plan = dataset, plan
        factory = functools.partial(build_mil, "LiteMIL", input_dim=plan.dim, num_classes=len(CLASSES), **model)
        self.ours = ModelTraining(factory, dataset, self.inner.train, plan.training, SEED, torch.device("cpu"))
        self.plain = PlainTraining(PlainChunks(cohort, plan.chunk_size), self.inner.train, plan, SEED)
        self.feed = SlideFeed.of_mode(dataset.mode, dataset.chunk_size, dataset.sequential)

    def validate_ours(self) -> dict[str, float | None]:
        return validate(self.ours.model, self.dataset, self.inner.val, self.ours.loss_weights, self.feed)[0]

    def validate_plain(self) -> dict[str, float | None]:
        return self.plain.validate(self.inner.val)


class Recorded(MILDataset):
    """Keeps the batches it last fed."""

    def batches(self, *arguments: Any, **options: Any) -> Iterator[Batch]:
        self.fed: list[Batch] = []
        for batch in super().batches(*arguments, **options):
            self.fed.append(batch)
            yield batch


def loss_curves(folder: Path, plan: Plan = SMALL) -> dict[str, np.ndarray]:
    """Return the training and validation losses `(epochs, 2)` of each way: from the same weights, on the same chunks of
    neighbouring patches in the same order, without dropout.
    """
    write_cohort(folder, plan)
    dataset = our_dataset(plan, folder, folder, Recorded, sequential=True)
    pair = Pair(plan, folder, dataset, dropout=0.0)
    same_weights_without_dropout(pair.plain.model, pair.ours.model)
    curves: dict[str, list[tuple[float, float | None]]] = {way: [] for way in WAYS}
    for number in range(1, plan.epochs + 1):
        curves["ours"].append((pair.ours.epoch(number)["train_loss"], pair.validate_ours()["val_loss"]))
        order = [items_of(batch, pair.plain.chunks) for batch in dataset.fed]
        curves["plain"].append((pair.plain.epoch(number, order), pair.validate_plain()["val_loss"]))
    return {way: np.array(curve, dtype=float) for way, curve in curves.items()}


def same_weights_without_dropout(plain_model: PlainLiteMIL, model: nn.Module) -> None:
    state = {name.removeprefix("stream."): value for name, value in model.state_dict().items()}
    plain_model.load_state_dict(state)
    plain_model.attn.dropout = 0.0
    for module in plain_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def items_of(batch: Batch, chunks: PlainChunks) -> list[int]:
    """Return the chunks of a batch, identified by their features."""
    return [
        next(item for item in chunks.of(np.array([slide])).tolist() if torch.equal(chunks[item][0], bag))
        for slide, bag in zip(batch.slides.tolist(), batch.bags, strict=True)
    ]


def largest_difference(curves: dict[str, np.ndarray]) -> float:
    """Return the largest relative difference of the two ways' losses."""
    return float((np.abs(curves["ours"] - curves["plain"]) / np.abs(curves["plain"])).max())


def time_epochs(plan: Plan, folder: Path, cache: Path, epochs: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Return median wall and processor seconds of the parts of an inner training; the ways take turns."""
    torch.set_num_threads(plan.threads)
    plan = replace(plan, epochs=epochs)
    pair = Pair(plan, folder, our_dataset(plan, folder, cache))
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {way: [] for way in WAYS} for name in ("train", "validate")}
    for number in range(1, epochs + 1):
        runs: list[tuple[str, str, Callable[[], Any]]] = [
            ("train", "plain", functools.partial(pair.plain.epoch, number)),
            ("train", "ours", functools.partial(pair.ours.epoch, number)),
            ("validate", "plain", pair.validate_plain),
            ("validate", "ours", pair.validate_ours),
        ]
        for name, way, run in runs:
            before = clock()
            run()
            found[name][way].append(clock() - before)
    names = {"train": "an epoch of training", "validate": "a validation"}
    return {
        names[name]: {way: tuple(np.median(taken, axis=0)) for way, taken in ways.items()}
        for name, ways in found.items()
    }


def rows(found: dict[str, dict[str, tuple[float, float]]]) -> list[list[str]]:
    """Return a row per part: seconds of both ways and their ratio, then the same for processor time."""
    cells = []
    for name, ways in found.items():
        pairs = zip(ways["plain"], ways["ours"], strict=True)
        figures = [(one, other, one / other if other else math.nan) for one, other in pairs]
        cells.append([name, *(f"{figure:.2f}" for triple in figures for figure in triple)])
    return cells


def whole_runs(plan: Plan, folder: Path, home: Path, repeats: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the medians of both ways for each part of the whole cross-validation; the ways take turns."""
    taken: dict[str, list[dict[str, tuple[float, float]]]] = {way: [] for way in WAYS}
    for turn in range(repeats):
        for way in WAYS:
            taken[way].append(in_own_process(timed, way, plan, folder, home / f"{way}_{turn}"))
    return {
        part: {
            way: tuple(statistics.median(run[part][kind] for run in runs) for kind in range(2))
            for way, runs in taken.items()
        }
        for part in taken["ours"][0]
    }


def pooled_auc(folder: Path, output: Path) -> float:
    """Return the AUC of the out-of-fold predictions."""
    labels = pd.read_csv(folder / "labels.csv", dtype=str, index_col="wsi_id")["label"].eq(CLASSES[1])
    score = pd.read_csv(output / "predictions.csv", index_col="wsi_id")[f"prob_{CLASSES[1]}"][labels.index].to_numpy()
    figures = TASK.unweighted_metrics(labels.to_numpy(dtype=int), np.stack([1 - score, score], axis=1))
    return figures["auc"] or float("nan")


def flags(default: Plan) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=default.slides)
    parser.add_argument("--patches", type=int, default=default.patches, help="of a slide, the mean")
    parser.add_argument("--dim", type=int, default=default.dim)
    parser.add_argument("--chunk_size", type=int, default=default.chunk_size)
    parser.add_argument(
        "--layout", choices=LAYOUTS, help=f"of the files (default: {default.layout}; on a card LiteMIL)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "float16"], help="of the features (default: float32; on a card float16)"
    )
    parser.add_argument("--n_outer", type=int, default=default.n_outer)
    parser.add_argument("--n_inner", type=int, default=default.n_inner)
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument("--batch_size", type=int, default=default.batch_size, help="chunks per step")
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument(
        "--jobs", type=int, nargs="+", help="processes of ours, which share the threads (default: 1; on a card 1 2 4)"
    )
    parser.add_argument("--workers", type=int, default=default.workers, help="of the plain way's DataLoader")
    parser.add_argument("--repeats", type=int, default=1, help="turns of each whole cross-validation")
    parser.add_argument("--turns", type=int, default=5, help="epochs of the single training that is timed in parts")
    parser.add_argument("--folder", type=Path, help="where the files go, a temporary folder by default")
    parser.add_argument("--device", choices=card.DEVICES, default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=card.SECONDS, help="on a card: begin nothing more after so many"
    )
    return parser


def main() -> None:
    default = Plan()
    parser = flags(default)
    asked = parser.parse_args()
    fields = {"layout": "LiteMIL", "dtype": "float16"} if asked.device == "cuda" else {}
    fields |= {name: value for name, value in vars(asked).items() if name in vars(default) and value is not None}
    plan = Plan(**(fields | {"jobs": (asked.jobs or [1])[0]}))
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        if asked.device == "cuda":
            from nested_cv_on_card import on_card

            for text in on_card(plan, asked, Path(name)):
                print(text, flush=True)
        elif len(asked.jobs or [1]) > 1:
            parser.error("--jobs: on a CPU one number of processes at a time")
        else:
            on_cpu(plan, asked, Path(name))


def on_cpu(plan: Plan, asked: argparse.Namespace, home: Path) -> None:
    """Print both ways' tables."""
    difference = largest_difference(loss_curves(home / "small"))
    write_cohort(home / "cohort", plan)
    epochs = in_own_process(time_epochs, plan, home / "cohort", home / "packed", asked.turns)
    whole = whole_runs(plan, home / "cohort", home, asked.repeats)
    aucs = [f"{way} {pooled_auc(home / 'cohort', home / f'{way}_0'):.3f}" for way in WAYS]
    size = f"{plan.slides} slides of about {plan.patches:,} x {plan.dim} {plan.dtype} ({plan.layout})"
    shape = f"{plan.n_outer} x {plan.n_inner} folds, {plan.epochs} epochs, {plan.batch_size} chunks per step"
    means = f"{plan.threads} threads, {plan.jobs} jobs, {plan.workers} workers"
    print(", ".join([processor(), means, size, shape, f"{asked.repeats} turns", *versions()]))
    print(f"\nLosses of both ways, {SMALL.epochs} epochs without dropout: they differ by {difference:.1e} at the most")
    heading = " | plain, s | ours, s | plain / ours | plain, CPU s | ours, CPU s | plain / ours"
    print(f"\nOne inner training, medians of {asked.turns} turns\n")
    print(table(heading, rows(epochs)))
    print("\nThe whole cross-validation\n")
    print(table(heading, rows(whole)))
    print(f"\nPooled AUC of the tests: {', '.join(aucs)}")


if __name__ == "__main__":
    main()
