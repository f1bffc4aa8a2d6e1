"""Train one model: AdamW, warm-up and cosine, class-balanced loss, early stopping on slide-level validation."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from MILS.bag_model import BagModel, evaluating
from utils.bags.chunks import Batch
from utils.bags.dataset import MILDataset
from utils.bags.device_stream import batches_ahead, slides_ahead
from utils.core.device import amp_dtype, seed_everything, set_tf32, uses_tf32
from utils.core.errors import DivergedError
from utils.core.runtime import derive_seed
from utils.learning.early_stopping import EarlyStopping
from utils.learning.settings import Training
from utils.learning.standardization import feature_scale, standardize
from utils.prediction.forward_pass import SlideFeed, SlideOutput, predict_features, predict_values, set_references


@dataclass(frozen=True)
class Fitted:
    """The epoch of a training that is kept: a copy of its weights on the CPU, its number from 1, its validation figures
    and its `val_probabilities (n, C)` (empty without validation slides); and every epoch's row for history.csv.
    """

    state_dict: dict[str, Tensor]
    epoch: int
    validation: dict[str, float | None]
    val_probabilities: Tensor
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Diverged:
    """A training that ended without a model, and the reason."""

    reason: str


class ModelTraining:
    """A fresh model, trained on the slides `train` epoch by epoch. It standardises features by those slides if
    `settings.standardize` is "on"; "auto" is resolved before (`learning.scale`).

    All random numbers derive from `seed`, those of each epoch independently.
    """

    def __init__(
        self,
        model_factory: Callable[[], BagModel],
        dataset: MILDataset,
        train: np.ndarray,
        settings: Training,
        seed: int,
        device: torch.device,
    ) -> None:
        set_tf32(device, uses_tf32(settings.amp_precision, device))
        seed_everything(seed)
        self.model = model_factory().to(device)
        if settings.standardize == "on":
            standardize(self.model, *feature_scale(dataset.features, train))
        self.dataset, self.train, self.settings, self.seed, self.device = dataset, train, settings, seed, device
        weights = dataset.task.loss_weights(dataset.labels[train])
        self.loss_weights = weights if settings.class_weights == "balanced" else np.ones_like(weights)
        self.steps = 0
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),  # the same step, several times faster
        )
        self.amp_dtype = amp_dtype(settings.amp_precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype is torch.float16)

    def epoch(self, number: int) -> dict[str, Any]:
        """Train for one epoch, counted from 1, and return its row of history. Raises DivergedError if the loss is not
        finite.
        """
        rate = learning_rate(number, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        epoch_seed = derive_seed(self.seed, "epoch", number)
        seed_everything(epoch_seed)
        loss = self._steps(self._batches(epoch_seed))
        if not math.isfinite(loss):
            remedy = "lower --lr" + (", or give --precision fp32" if self.amp_dtype is not None else "")
            raise DivergedError(f"the loss of epoch {number} is {loss} at learning rate {rate:.3g}; {remedy}")
        return {"epoch": number, "train_loss": loss, "lr": rate}

    def step(self, slides: np.ndarray, batch_size: int) -> None:
        """Train for one step, on the first batch of an epoch over `slides`."""
        self._steps(itertools.islice(self.dataset.batches(slides, batch_size, self.seed), 1))

    def _batches(self, seed: int) -> Iterable[Batch]:
        """Return an epoch's batches; those for a GPU come through page-locked memory."""
        size = self.settings.batch_size
        if self.device.type != "cuda":
            return self.dataset.batches(self.train, size, seed)
        return self.dataset.batches(self.train, size, seed, pin_memory=True)

    def _steps(self, batches: Iterable[Batch]) -> float:
        """Take a step on each batch and return the mean loss over chunks, each weighted by its share of its slide."""
        self.model.train()
        weights = torch.tensor(self.loss_weights, dtype=torch.float32, device=self.device)
        losses, sizes = [], []
        for batch in batches_ahead(batches, self.device):
            with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                logits, _ = self.model.forward_bags(batch.bags)
            chunk_losses = self.dataset.task.loss(logits, batch.labels, weights)
            loss = (chunk_losses * batch.weights).mean()
            self._step(loss)
            losses.append(loss.detach())
            sizes.append(len(batch.labels))
        # Copied only now: each copy waits for the device.
        return float(np.average(torch.stack(losses).cpu().double().numpy(), weights=sizes))

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the weights, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def with_reference(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of this training with what evidence begins at: the mean pooled embedding of its slides.

        Classes (strata) weigh there as in the loss. Where they weigh alike, a frequent class is not what its own
        evidence begins at.
        """
        self.model.load_state_dict(weights)
        strata = self.dataset.task.strata(self.dataset.labels[self.train])
        is_balanced = self.settings.class_weights == "balanced"
        shares = 1 / np.bincount(strata)[strata] if is_balanced else np.ones(len(strata))
        feed = SlideFeed.of_mode(self.dataset.mode, self.dataset.chunk_size, self.dataset.sequential, self.dataset.unit)
        set_references(self.model, lambda: map(self.dataset.features, self.train), feed, shares)
        return self.weights()


def fit(
    model_factory: Callable[[], BagModel],
    dataset: MILDataset,
    train: np.ndarray,
    stopping: EarlyStopping,
    settings: Training,
    *,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Fitted:
    """Train a fresh model on the slides `train`, and keep the last epoch or, as `stopping.keep` says, the best one.

    The best is the one that does best on the validation slides, of those after `settings.least_steps` steps.

    Then training stops after `settings.patience` epochs without a better one. `on_epoch` is called with each epoch's
    row of history. Raises DivergedError if a loss or a prediction is not finite.
    """
    training = ModelTraining(model_factory, dataset, train, settings, seed, device)
    best: Fitted | None = None
    history: list[dict[str, Any]] = []
    for epoch in range(1, settings.epochs + 1):
        row = training.epoch(epoch)
        validation, probabilities = validate(
            training.model, dataset, stopping.slides, training.loss_weights, stopping.feed
        )
        history.append(row | validation)
        may_keep = stopping.may_keep(epoch, training.steps, settings)
        if may_keep and (best is None or stopping.is_better(validation, best.validation)):
            best = Fitted(training.weights(), epoch, validation, torch.from_numpy(probabilities), history)
        on_epoch(history[-1])
        if best is not None and stopping.is_over(epoch, best.epoch, settings):
            break
    assert best is not None  # noqa: S101 - for the type checker: the last epoch may be kept
    return replace(best, state_dict=training.with_reference(best.state_dict))


def refit(
    model_factory: Callable[[], BagModel],
    dataset: MILDataset,
    train: np.ndarray,
    settings: Training,
    *,
    epochs: int,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Fitted:
    """Train a fresh model on the slides `train` for the first `epochs` epochs of the schedule, as `fit` does, but
    without validation and early stopping.
    """
    training = ModelTraining(model_factory, dataset, train, settings, seed, device)
    history = []
    for epoch in range(1, epochs + 1):
        history.append(training.epoch(epoch))
        on_epoch(history[-1])
    weights = training.with_reference(training.weights())
    return Fitted(weights, epochs, {}, torch.empty(0, len(dataset.task.outputs)), history)


def learning_rate(epoch: int, settings: Training) -> float:
    """Return the learning rate of an epoch: a linear warm-up (shorter in a short training), then a cosine."""
    warmup = settings.warmup
    if epoch <= warmup:
        return settings.lr * epoch / warmup
    progress = (epoch - 1 - warmup) / max(1, settings.epochs - 1 - warmup)
    final = min(settings.final_lr, settings.lr)
    return final + (settings.lr - final) * 0.5 * (1 + math.cos(math.pi * progress))


def validate(
    model: BagModel, dataset: MILDataset, slides: np.ndarray, loss_weights: np.ndarray, feed: SlideFeed
) -> tuple[dict[str, float | None], np.ndarray]:
    """Return the slide-level figures `val_loss`, `val_auc`, ... of the slides, and their values `(n, C)`. Raises
    DivergedError if a value is not finite.
    """
    features = (dataset.features(int(slide)) for slide in slides)
    ahead = slides_ahead(features, next(model.parameters()).device)
    values = predict_values(dataset.task, model, ahead, feed)
    _check_finite(model, values)
    figures = dataset.task.validation(dataset.labels[slides], values, loss_weights)
    return {f"val_{name}": value for name, value in figures.items()}, values


def predict_slides(model: BagModel, dataset: MILDataset, slides: np.ndarray, feed: SlideFeed) -> list[SlideOutput]:
    """Return the model's output for each slide. Raises DivergedError if one is not finite."""
    with evaluating(model):  # once for all slides
        outputs = [predict_features(dataset.task, model, dataset.features(int(slide)), feed) for slide in slides]
    _check_finite(model, np.stack([output.probabilities for output in outputs]))
    return outputs


def _check_finite(model: BagModel, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        on_cpu = next(model.parameters()).device.type == "cpu"
        remedy = "lower --lr" + ("" if on_cpu else ", or give --precision fp32")  # a CPU computes in fp32 anyway
        raise DivergedError(f"the model's output for a slide is not finite; {remedy}")
