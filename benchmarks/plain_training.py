"""A cross-validation of LiteMIL as the first version did it, for `nested_cv.py`."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from references import PlainLiteMIL
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trained_cohort import CLASSES, SEED, TASK, Cohort, Plan

from utils.bags.chunks import cut_chunks
from utils.core.device import seed_everything
from utils.core.runtime import derive_seed
from utils.learning.training import learning_rate
from utils.tasks.metrics import balanced_class_weights, log_loss


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
