"""A plain model of a few numbers of each slide, such as age and sex: linear, with the task's own loss and a penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils.bags.described_columns import Column
from utils.tasks.task import Task

_STEPS = 200  # of LBFGS at most


@dataclass(frozen=True, eq=False)
class PlainModel:
    """A linear model: `weights (d, K)` of its d inputs make K sums (see `Task.effects`), `constants (L,)` are those of
    the logits.
    """

    task: Task
    weights: torch.Tensor
    constants: torch.Tensor

    @classmethod
    def fit(
        cls, task: Task, inputs: np.ndarray, targets: np.ndarray, cases: np.ndarray, *, is_balanced: bool
    ) -> PlainModel:
        """Fit the model to slides with these `inputs (n, d)`, targets and patients `(n,)`; a patient's slides weigh as
        much as one. The penalty is that of a standard normal prior of each weight (ridge).

        `is_balanced` weighs the loss by `Task.loss_weights`, as the training of other models does.
        """
        effects = torch.from_numpy(task.effects).float()
        weights = torch.zeros(inputs.shape[1], len(effects), requires_grad=True)
        constants = torch.zeros(effects.shape[1], requires_grad=True)
        numbers, truth = torch.from_numpy(inputs).float(), torch.from_numpy(targets)
        in_loss = task.loss_weights(targets)
        of_loss = torch.from_numpy(in_loss if is_balanced else np.ones_like(in_loss)).float()
        patient_of = np.unique(cases, return_inverse=True)[1]
        shares = torch.from_numpy(1 / np.bincount(patient_of)[patient_of]).float()
        optimizer = torch.optim.LBFGS([weights, constants], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            losses = task.loss(numbers @ weights @ effects + constants, truth, of_loss)
            loss = ((losses * shares).sum() + (weights**2).sum() / 2) / shares.sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # pyright: ignore[reportArgumentType] - the loss is a tensor, as LBFGS takes it
        return cls(task, weights.detach(), constants.detach())

    def values(self, inputs: np.ndarray) -> np.ndarray:
        """Return the task's values `(n, C)` for `inputs (n, d)`."""
        sums = torch.from_numpy(inputs).float() @ self.weights
        return self.task.activate(sums @ torch.from_numpy(self.task.effects).float() + self.constants)


def encoded(columns: Sequence[Column], train: np.ndarray) -> np.ndarray:
    """Return columns of n slides as inputs `(n, d)` of a plain model that is trained on the slides `train (m,)`, an
    index array. What is fitted is fitted to those alone.

    A number is standardised; an unknown one becomes the median, and a further input marks it if `train` has some.
    Words become an input for each one in `train`; unknown is one, too. Other words have none.
    """
    inputs: list[np.ndarray] = []
    for column in columns:
        if not column.is_number:
            inputs += [column.values == word for word in np.unique(column.values[train])]
            continue
        known = column.is_known
        numbers = column.values[train][known[train]]
        filled = np.where(known, column.values, np.median(numbers) if len(numbers) else 0)
        inputs.append(standardized(filled, filled[train]))
        if not known[train].all():
            inputs.append(~known)
    return np.stack(inputs, axis=1).astype(np.float64)


def standardized(numbers: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return numbers `(n,)` or `(n, k)` less the mean of the training numbers, in their standard deviations."""
    return scaled(numbers, train.mean(axis=0), train.std(axis=0))


def scaled(numbers: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Return numbers `(n,)` or `(n, k)` less a mean, in standard deviations; a deviation of 0 counts as 1."""
    return (numbers - mean) / np.where(deviation > 0, deviation, 1)
