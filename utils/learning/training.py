"""One training: AdamW, warm-up and cosine, class-balanced loss, early stopping on slide-level validation."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own abbreviation

from MILS.pooling import BagModel
from utils.bags.collate import Batch
from utils.core.config import Training
from utils.core.errors import TrainingError
from utils.core.runtime import ahead, derive_seed, seed_everything
from utils.learning.aggregation import SlideFeed, SlideOutput, predict_features
from utils.learning.metrics import balanced_class_weights, classification_metrics, log_loss


class Bags(Protocol):
    """What a training needs of a dataset; `utils.mil_dataset.MILDataset` is one."""

    labels: np.ndarray
    class_names: tuple[str, ...]

    def features(self, slide: int) -> torch.Tensor: ...

    def batches(self, slides: np.ndarray, batch_size: int, seed: int, pin_memory: bool = False) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Fitted:
    """The best epoch of a training: its weights (copied, on the CPU), its number from 1, its validation figures; and
    every epoch's row for history.csv.
    """

    state_dict: dict[str, torch.Tensor]
    epoch: int
    validation: dict[str, float | None]
    history: list[dict[str, Any]]


def fit(
    model_factory: Callable[[], BagModel],
    dataset: Bags,
    train: np.ndarray,
    val: np.ndarray,
    settings: Training,
    *,
    monitor: str,
    feed: SlideFeed,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[dict[str, float | None]], None] = lambda _: None,
) -> Fitted:
    """Train a fresh model on the slides `train`, keep the epoch that does best on the slides `val`.

    `monitor` "auc" takes the highest slide-level AUC (ties: the lowest loss), "loss" the lowest slide-level loss.
    Everything random derives from `seed`, each epoch on its own. `on_epoch` hears each epoch's validation figures.
    Raises TrainingError at a loss or an answer that is not finite.
    """
    seed_everything(seed)
    model = model_factory().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    class_weights = balanced_class_weights(dataset.labels[train], len(dataset.class_names))
    stepper = _Stepper(model, optimizer, class_weights, settings, device)
    best: Fitted | None = None
    history: list[dict[str, Any]] = []
    for epoch in range(1, settings.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, settings)
        epoch_seed = derive_seed(seed, "epoch", epoch)
        seed_everything(epoch_seed)
        train_loss = stepper.epoch(_fed(dataset, train, settings.batch_size, epoch_seed, device))
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"the loss of epoch {epoch} is {train_loss} at learning rate {learning_rate(epoch, settings):.3g}; "
                "lower --lr, or give --no_amp"
            )
        validation = validate(model, dataset, val, class_weights, feed)
        history.append({"epoch": epoch, "train_loss": train_loss, **validation, "lr": learning_rate(epoch, settings)})
        if best is None or rank(validation, monitor) > rank(best.validation, monitor):
            best = Fitted(_copied_state(model), epoch, validation, history)
        on_epoch(validation)
        if epoch - best.epoch >= settings.patience:
            break
    assert best is not None  # noqa: S101 - for the type checker: there is at least one epoch
    return best


def _fed(dataset: Bags, train: np.ndarray, batch_size: int, seed: int, device: torch.device) -> Iterable[Batch]:
    """An epoch's batches; for a GPU in page-locked memory, each made while the GPU works on the one before."""
    if device.type != "cuda":
        return dataset.batches(train, batch_size, seed)
    return ahead(dataset.batches(train, batch_size, seed, pin_memory=True))


def learning_rate(epoch: int, settings: Training) -> float:
    """The rate of epoch 1, 2, ...: a linear warm-up (shorter in a short training), then a cosine to `final_lr`."""
    warmup = min(settings.warmup_epochs, settings.epochs // 4)
    if epoch <= warmup:
        return settings.lr * epoch / warmup
    done = (epoch - 1 - warmup) / max(1, settings.epochs - 1 - warmup)
    final = min(settings.final_lr, settings.lr)
    return final + (settings.lr - final) * 0.5 * (1 + math.cos(math.pi * done))


def rank(validation: dict[str, float | None], monitor: str) -> tuple[float, ...]:
    """What epochs and inner models are compared by; greater is better."""
    loss = validation["val_loss"]
    assert loss is not None  # noqa: S101 - for the type checker: only the AUC can be undefined
    return (-loss,) if monitor == "loss" else (_known(validation["val_auc"]), -loss)


def validate(
    model: BagModel, dataset: Bags, slides: np.ndarray, class_weights: np.ndarray, feed: SlideFeed
) -> dict[str, float | None]:
    """Slide-level figures `val_loss`, `val_auc`, ... of the slides."""
    outputs = predict_slides(model, dataset, slides, feed)
    probabilities = np.stack([output.probabilities for output in outputs])
    labels = dataset.labels[slides]
    figures = classification_metrics(labels, probabilities)
    loss = log_loss(labels, probabilities, class_weights)
    return {"val_loss": loss} | {f"val_{name}": value for name, value in figures.items()}


def predict_slides(model: BagModel, dataset: Bags, slides: np.ndarray, feed: SlideFeed) -> list[SlideOutput]:
    """The model's answer for each slide. Raises TrainingError at one that is not finite."""
    outputs = [predict_features(model, dataset.features(int(slide)), feed) for slide in slides]
    if not all(np.isfinite(output.probabilities).all() for output in outputs):
        raise TrainingError("the model's answer for a slide is not finite; lower --lr, or give --no_amp")
    return outputs


class _Stepper:
    """One model's optimisation steps, with the one gradient scaler that its whole training shares."""

    def __init__(
        self,
        model: BagModel,
        optimizer: torch.optim.Optimizer,
        class_weights: np.ndarray,
        settings: Training,
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.settings, self.device = model, optimizer, settings, device
        self.class_weights = torch.tensor(class_weights, dtype=torch.float32, device=device)
        self.use_amp = settings.use_amp and device.type == "cuda"
        self.amp_dtype = torch.bfloat16 if self.use_amp and torch.cuda.is_bf16_supported() else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.use_amp and self.amp_dtype is torch.float16)

    def epoch(self, batches: Iterable[Batch]) -> float:
        """Train on `batches`; the loss is the mean over chunks, each weighing its share of its slide."""
        self.model.train()
        total, weight = 0.0, 0.0
        for batch in batches:
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.use_amp):
                logits, _ = self.model.forward_bags(batch.bags)
            losses = F.cross_entropy(logits.float(), batch.labels, weight=self.class_weights, reduction="none")
            loss = (losses * batch.weights).mean()
            self._step(loss)
            total += float(loss.detach()) * len(batch.labels)
            weight += len(batch.labels)
        return total / weight

    def _step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def _known(value: float | None) -> float:
    if value is None:
        raise TrainingError("the validation slides hold one class only, so that AUC cannot choose; monitor the loss")
    return value


def _copied_state(model: BagModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
