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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import card
import h5py
import numpy as np
import pandas as pd
import torch
from loading import CHUNK, LAYOUTS
from references import PlainLiteMIL
from report import processor, table, versions
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from MILS import build_mil
from utils.bags.chunks import Batch, cut_chunks
from utils.core.device import seed_everything
from utils.core.runtime import derive_seed
from utils.learning.settings import Training
from utils.learning.splits import InnerFold, OuterFold, nested_splits
from utils.learning.training import ModelTraining, learning_rate, validate
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation
from utils.prediction.forward_pass import SlideFeed
from utils.tasks.classification import Classification
from utils.tasks.metrics import balanced_class_weights, log_loss

CLASSES = ("benign", "malignant")
TASK = Classification(tuple(CLASSES))
SEED = 42
SIGNAL = 0.5  # how much higher one feature is, in a third of a slide's patches
WAYS = ("plain", "ours")


@dataclass(frozen=True)
class Plan:
    """The cohort, and how it is trained on."""

    slides: int = 200
    patches: int = 3000
    dim: int = 1024
    chunk_size: int = CHUNK
    layout: str = "CLAM, (32, D)"
    n_outer: int = 5
    n_inner: int = 4
    epochs: int = 2
    batch_size: int = 128
    lr: float = 1e-4
    threads: int = field(default_factory=torch.get_num_threads)
    jobs: int = 1
    workers: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def training(self) -> Training:
        return Training(epochs=self.epochs, patience=self.epochs, batch_size=self.batch_size, lr=self.lr)


# The agreement of both ways is looked at on chunks of many lengths, and a rate at which the loss moves.
SMALL = Plan(slides=24, patches=60, dim=32, chunk_size=25, n_outer=2, n_inner=2, epochs=5, batch_size=8, lr=2e-3)


@dataclass(frozen=True)
class Cohort:
    """The slides of a folder that `write_cohort` filled."""

    paths: list[Path]
    labels: np.ndarray
    cases: np.ndarray

    @classmethod
    def of(cls, folder: Path) -> "Cohort":
        rows = pd.read_csv(folder / "labels.csv", dtype=str)
        paths = [folder / "features" / f"{wsi_id}.h5" for wsi_id in rows["wsi_id"]]
        return cls(paths, rows["label"].map(CLASSES.index).to_numpy(), rows["case_id"].to_numpy())

    def folds(self, plan: Plan) -> list[OuterFold]:
        return nested_splits(self.labels, self.cases, CLASSES, plan.n_outer, plan.n_inner, SEED)


def write_cohort(folder: Path, plan: Plan) -> None:
    """Write slides of half to one and a half times `plan.patches`, four for every three patients."""
    (folder / "features").mkdir(parents=True)
    rng = np.random.default_rng(0)
    patients = -(-plan.slides * 3 // 4)
    lines = ["case_id,wsi_id,label"]
    for slide in range(plan.slides):
        patient = slide % patients
        label = patient % len(CLASSES)
        count = int(rng.integers(plan.patches // 2, plan.patches * 3 // 2, endpoint=True))
        features = rng.standard_normal((count, plan.dim), dtype=np.float32)
        features[::3, label] += SIGNAL
        coords = 256 * np.stack([np.arange(count) % 100, np.arange(count) // 100], axis=1)
        LAYOUTS[plan.layout](folder / "features" / f"S{slide}.h5", features.astype(plan.dtype, copy=False), coords)
        lines.append(f"P{patient},S{slide},{CLASSES[label]}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


class PlainChunks(torch.utils.data.Dataset):
    """An item is a chunk: `features (n, D)` float32, the slide's class, the slide."""

    def __init__(self, cohort: Cohort, chunk_size: int) -> None:
        self.cohort = cohort
        self.items = []
        for slide, path in enumerate(cohort.paths):
            with h5py.File(path, "r") as file:
                length = file["features"].shape[0]
            self.items += [(slide, cut) for cut in cut_chunks(length, chunk_size, sequential=True)]
        self.slides = np.array([slide for slide, _ in self.items])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> tuple[Tensor, int, int]:
        slide, cut = self.items[item]
        with h5py.File(self.cohort.paths[slide], "r") as file:
            features = torch.from_numpy(file["features"][cut.start : cut.stop]).float()
            torch.from_numpy(file["coords"][cut.start : cut.stop]).float()
        return features, int(self.cohort.labels[slide]), slide

    def of(self, slides: np.ndarray) -> np.ndarray:
        """Return the items of these slides."""
        return np.flatnonzero(np.isin(self.slides, slides))


def pad_and_mask(items: Sequence[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x (B, N, D), its mask (B, N) (True on padding), labels (B,) and slides (B,)."""
    bags, labels, slides = zip(*items, strict=True)
    lengths = torch.tensor([len(bag) for bag in bags])
    mask = torch.arange(int(lengths.max())) >= lengths.unsqueeze(1)
    x = nn.utils.rnn.pad_sequence(list(bags), batch_first=True)
    return x, mask, torch.tensor(labels), torch.tensor(slides)


class PlainTraining:
    """A training like the first version's, with our model and our loss."""

    def __init__(self, chunks: PlainChunks, train: np.ndarray, plan: Plan, seed: int) -> None:
        seed_everything(seed)
        self.chunks, self.train, self.plan, self.seed = chunks, train, plan, seed
        self.model = PlainLiteMIL(plan.dim, len(CLASSES))
        settings = plan.training
        self.optimizer = torch.optim.AdamW(self.model.parameters(), settings.lr, weight_decay=settings.weight_decay)
        self.class_weights = balanced_class_weights(chunks.cohort.labels[train], len(CLASSES))
        # Each slide has the same share of the loss, whatever its chunks; over all chunks the weights average 1.
        of_slide = np.bincount(chunks.slides, minlength=len(chunks.cohort.paths))
        self.weights = torch.tensor(of_slide[train].sum() / len(train) / of_slide, dtype=torch.float32)

    def epoch(self, number: int, order: Sequence[Sequence[int]] | None = None) -> float:
        """Train one epoch and return its loss: over all items, shuffled, or over the batches of `order`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.plan.training)
        seed_everything(derive_seed(self.seed, number))
        self.model.train()
        class_weights = torch.tensor(self.class_weights, dtype=torch.float32)
        total, count = 0.0, 0
        for x, mask, labels, slides in self._loader(order or self._batches(shuffle=True, slides=self.train)):
            losses = cross_entropy(self.model(x, mask), labels, weight=class_weights, reduction="none")
            loss = (losses * self.weights[slides]).mean()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.training.clip_norm)
            self.optimizer.step()
            total, count = total + loss.item() * len(labels), count + len(labels)
        return total / count

    @torch.no_grad()
    def probabilities(self, slides: np.ndarray) -> np.ndarray:
        """Return `(n, C)`: each slide's mean over its chunks, weighted by their numbers of patches."""
        self.model.eval()
        summed = np.zeros((len(self.chunks.cohort.paths), len(CLASSES)))
        patches = np.zeros(len(summed))
        for x, mask, _, found in self._loader(self._batches(shuffle=False, slides=slides)):
            each = torch.softmax(self.model(x, mask).double(), dim=1).numpy()
            lengths = (~mask).sum(dim=1).numpy()
            np.add.at(summed, found.numpy(), each * lengths[:, None])
            np.add.at(patches, found.numpy(), lengths)
        return summed[slides] / patches[slides, None]

    def validate(self, slides: np.ndarray) -> dict[str, float | None]:
        labels, probabilities = self.chunks.cohort.labels[slides], self.probabilities(slides)
        loss = log_loss(labels, probabilities, self.class_weights)
        return {"val_loss": loss, "val_auc": TASK.unweighted_metrics(labels, probabilities)["auc"]}

    def _batches(self, *, shuffle: bool, slides: np.ndarray) -> list[list[int]]:
        items, size = self.chunks.of(slides), self.plan.batch_size
        items = np.random.permutation(items) if shuffle else items  # noqa: NPY002 - the epoch's seed is its generator's
        return [items[start : start + size].tolist() for start in range(0, len(items), size)]

    def _loader(self, batches: Sequence[Sequence[int]]) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            self.chunks, batch_sampler=batches, collate_fn=pad_and_mask, num_workers=self.plan.workers
        )


def plain(plan: Plan, folder: Path, output: Path) -> Iterator[str]:
    """Run the whole cross-validation the plain way; yield the name of each finished part."""
    cohort = Cohort.of(folder)
    chunks = PlainChunks(cohort, plan.chunk_size)
    for item in range(len(chunks)):
        chunks[item]  # for its label, all of it is loaded
    yield "before the first training"
    output.mkdir(parents=True)
    tested = []
    for fold in cohort.folds(plan):
        best: tuple[tuple[float, float], PlainTraining, Any] | None = None
        for number, inner in enumerate(fold.inner):
            training = PlainTraining(chunks, inner.train, plan, derive_seed(SEED, fold.number, number))
            for epoch in range(1, plan.epochs + 1):
                training.epoch(epoch)
                found = training.validate(inner.val)
                score = (found["val_auc"] or 0.0, -(found["val_loss"] or 0.0))
                if best is None or score > best[0]:
                    best = score, training, deepcopy(training.model.state_dict())
        assert best is not None  # noqa: S101 - for the type checker: there is an inner fold
        best[1].model.load_state_dict(best[2])
        torch.save(best[2], output / f"fold_{fold.number}_best.pth")
        answers = best[1].probabilities(fold.test)[:, 1]
        tested += [
            (cohort.paths[slide].stem, answer, fold.number) for slide, answer in zip(fold.test, answers, strict=True)
        ]
    written = pd.DataFrame(tested, columns=["wsi_id", f"prob_{CLASSES[1]}", "fold"])
    written.to_csv(output / "predictions.csv", index=False)
    yield "from there to the results"


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


def main() -> None:
    default = Plan()
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
