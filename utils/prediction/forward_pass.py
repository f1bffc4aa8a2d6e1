"""Run a model over a slide's features: the code that validation, test and prediction share.

`mean` is the instance-weighted mean of the chunks' probabilities. `merge` is the exact output for the slide as one bag,
streamed in blocks if the model can.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from MILS.bag_model import BagModel, evaluating
from MILS.ensemble import Ensemble
from MILS.mergeable import BLOCK_ROWS, MergeableModel
from utils.bags.chunks import Cut, cut_chunks, take
from utils.bags.store import StoredFeatures
from utils.tasks.task import Task


@dataclass(frozen=True)
class SlideFeed:
    """How a slide is fed to a model: `chunk_size` None is the whole slide; `aggregation` is "mean" or "merge"; chunks
    are consecutive patches if `sequential`, else each is spread over the slide.
    """

    chunk_size: int | None
    aggregation: str
    sequential: bool = False

    @classmethod
    def of_mode(cls, mode: str, chunk_size: int, sequential: bool = False) -> "SlideFeed":
        """Return the feed of a mode: "chunked" averages chunks, "full" merges the slide."""
        return cls(chunk_size, "mean", sequential) if mode == "chunked" else cls(None, "merge")

    @property
    def mode(self) -> str:
        return "full" if self.chunk_size is None else "chunked"

    def as_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "chunk_size": self.chunk_size,
            "aggregation": self.aggregation,
            "sequential": self.sequential,
        }


@dataclass(frozen=True)
class SlideOutput:
    """The output for a slide: its `probabilities (C,)`; `chunk_probabilities (K, C)` and `chunk_sizes (K,)` of its
    chunks; `attention (H, N)`, each head summing to 1 over the slide, or None; and the probabilities of each model of
    an ensemble, `members (M, C)`, or None of a single one.
    """

    probabilities: np.ndarray
    chunk_probabilities: np.ndarray
    chunk_sizes: np.ndarray
    attention: np.ndarray | None
    members: np.ndarray | None = None

    @property
    def each(self) -> np.ndarray:
        """Return the probabilities of each model, `(M, C)`."""
        return self.probabilities[None] if self.members is None else self.members


@torch.inference_mode()
def predict_features(
    task: Task, model: BagModel, features: torch.Tensor | StoredFeatures, feed: SlideFeed, attention: bool = False
) -> SlideOutput:
    """Run `model`, in evaluation mode, over `features (N, D)`. The output has attention only if `attention` is given.

    Stored features of a full slide are streamed from their file, if the model can.
    """
    if isinstance(features, StoredFeatures) and not (feed.mode == "full" and streams(model)):
        features = features.whole()
    if isinstance(model, Ensemble):
        return mean_output([predict_features(task, member, features, feed, attention) for member in model.models])
    with evaluating(model):
        cuts = cut_chunks(len(features), feed.chunk_size, sequential=feed.sequential)
        bags = [features if isinstance(features, StoredFeatures) else take(features, cut) for cut in cuts]
        chunks = [_predict_bag(task, model, bag, attention) for bag in bags]
        sizes = np.array([len(cut) for cut in cuts])
        each = np.stack([probabilities for probabilities, _ in chunks])
        whole = chunks[0] if len(cuts) == 1 else None
        if whole is None and feed.aggregation == "merge":
            whole = _predict_bag(task, model, features, attention)
        if whole is not None:
            return SlideOutput(whole[0], each, sizes, whole[1])
        weights = _join_attention([weights for _, weights in chunks], cuts, len(features)) if attention else None
        return SlideOutput(np.average(each, axis=0, weights=sizes), each, sizes, weights)


@torch.inference_mode()
def predict_values(task: Task, model: BagModel, slides: Iterable[torch.Tensor], feed: SlideFeed) -> np.ndarray:
    """Return the values `(n, C)` of slides, each `(N, D)`: those of `predict_features`, to rounding.

    Slides of one chunk are predicted together, as many as fit in a block, because small forward passes are slow.
    """
    device = next(model.parameters()).device
    largest = 0 if isinstance(model, Ensemble) else min(BLOCK_ROWS[device.type], feed.chunk_size or math.inf)
    values: list[np.ndarray] = []
    bags: list[torch.Tensor] = []

    def predict_bags() -> None:
        if bags:
            logits, _ = model.forward_bags(bags)
            values.extend(task.activate(logits))
            bags.clear()

    with evaluating(model):
        for features in slides:
            if sum(map(len, bags)) + len(features) > BLOCK_ROWS[device.type] or len(features) > largest:
                predict_bags()
            if len(features) > largest:
                values.append(predict_features(task, model, features, feed).probabilities)
            else:
                bags.append(features.to(device))
        predict_bags()
    return np.stack(values)


def streams(model: BagModel) -> bool:
    """Return whether a model can read a slide in blocks."""
    members = model.models if isinstance(model, Ensemble) else [model]
    return all(isinstance(member, MergeableModel) for member in members)


def blocks_of(features: torch.Tensor | StoredFeatures, model: BagModel) -> Iterable[torch.Tensor]:
    """Return the features `(N, D)` in blocks `(n, D)`, in their order, of the size for the model's device."""
    rows = BLOCK_ROWS[next(model.parameters()).device.type]
    return [features] if isinstance(features, torch.Tensor) else features.blocks(rows)


def mean_output(outputs: Sequence[SlideOutput]) -> SlideOutput:
    """Return the mean of several models' outputs for a slide fed in the same chunks; each model of an ensemble counts
    as one. If the models' numbers of heads differ, their attention is first averaged over the heads.
    """
    members = np.concatenate([output.each for output in outputs])
    counts = [len(output.each) for output in outputs]
    attentions = [output.attention for output in outputs if output.attention is not None]
    if len({len(weights) for weights in attentions}) > 1:
        attentions = [weights.mean(axis=0, keepdims=True) for weights in attentions]
    return SlideOutput(
        members.mean(axis=0),
        np.average([output.chunk_probabilities for output in outputs], axis=0, weights=counts),
        outputs[0].chunk_sizes,
        np.average(attentions, axis=0, weights=counts).astype(np.float32) if len(attentions) == len(outputs) else None,
        members,
    )


def mean_calibrated(
    task: Task, outputs: Sequence[SlideOutput], temperatures: Sequence[float | None]
) -> np.ndarray | None:
    """Return a slide's values `(C,)`: each model's, calibrated by its checkpoint's temperature, then averaged; None
    unless all have a temperature.
    """
    scaled = [
        task.calibrate(output.each, temperature)
        for output, temperature in zip(outputs, temperatures, strict=True)
        if temperature is not None
    ]
    return np.concatenate(scaled).mean(axis=0) if len(scaled) == len(outputs) else None


def _predict_bag(
    task: Task, model: BagModel, features: torch.Tensor | StoredFeatures, attention: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the probabilities `(C,)` in float64 and the attention `(H, N)` of one bag."""
    if isinstance(model, MergeableModel):
        logits, aux = model.forward_blocks(blocks_of(features, model), attention=attention)
    else:
        assert isinstance(features, torch.Tensor)  # noqa: S101 - for the type checker: read whole for such a model
        logits, aux = model(features.to(next(model.parameters()).device)[None])
    attn = aux["attn"] if attention else None
    weights = None if attn is None else attn[0].float().cpu().numpy()
    return task.activate(logits[0]), weights


def _join_attention(weights: list[np.ndarray | None], cuts: list[Cut], num_instances: int) -> np.ndarray | None:
    """Return the chunks' attention as one distribution over the slide, each chunk in proportion to its size."""
    chunks = [chunk for chunk in weights if chunk is not None]
    if len(chunks) < len(cuts):
        return None
    attention = np.empty((chunks[0].shape[0], num_instances), dtype=np.float32)
    for chunk, cut in zip(chunks, cuts, strict=True):
        attention[:, cut] = chunk * (len(cut) / num_instances)
    return attention
