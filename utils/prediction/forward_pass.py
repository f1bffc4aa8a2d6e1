"""Run a model over a slide's features: the code that validation, test and prediction share.

`mean` is the instance-weighted mean of the chunks' probabilities. `merge` is the exact output for the slide as one bag,
streamed in blocks if the model can.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from MILS.bag_model import BagModel, evaluating
from MILS.ensemble import Ensemble, members_of
from MILS.mergeable import BLOCK_ROWS, MergeableModel
from utils.bags.chunks import Cut, cut_chunks, take
from utils.bags.settings import Unit
from utils.bags.store import StoredFeatures
from utils.prediction.evidence import (
    Evidence,
    ReadBag,
    evidence_of,
    gradient_evidence,
    mean_evidence,
    mean_pooled,
    merged,
)
from utils.tasks.task import FittedFigures, Task


@dataclass(frozen=True)
class SlideFeed:
    """How a slide is fed to a model: `chunk_size` None is the whole slide; `aggregation` is "mean" or "merge"; chunks
    are consecutive patches if `sequential`, else each is spread over the slide. For the `unit` "case" all slides of a
    patient are fed as one.
    """

    chunk_size: int | None
    aggregation: str
    sequential: bool = False
    unit: Unit = "slide"

    @classmethod
    def of_mode(cls, mode: str, chunk_size: int, sequential: bool = False, unit: Unit = "slide") -> "SlideFeed":
        """Return the feed of a mode: "chunked" averages chunks, "full" merges the slide."""
        if mode == "chunked":
            return cls(chunk_size, "mean", sequential, unit)
        return cls(None, "merge", unit=unit)

    @property
    def mode(self) -> str:
        return "full" if self.chunk_size is None else "chunked"

    def as_dict(self) -> dict[str, Any]:
        """Return the entries of records, which name the unit only if it is no slide."""
        return {
            "mode": self.mode,
            "chunk_size": self.chunk_size,
            "aggregation": self.aggregation,
            "sequential": self.sequential,
            **({} if self.unit == "slide" else {"unit": self.unit}),
        }


@dataclass(frozen=True)
class SlideOutput:
    """The output for a slide: its `probabilities (C,)`; `chunk_probabilities (K, C)` and `chunk_sizes (K,)` of its
    chunks; `attention (H, N)`, each head summing to 1 over the slide, or None; the probabilities of each model of an
    ensemble, `members (M, C)`, or None of a single one; and its evidence, or None.
    """

    probabilities: np.ndarray
    chunk_probabilities: np.ndarray
    chunk_sizes: np.ndarray
    attention: np.ndarray | None
    members: np.ndarray | None = None
    evidence: Evidence | None = None

    @property
    def each(self) -> np.ndarray:
        """Return the probabilities of each model, `(M, C)`."""
        return self.probabilities[None] if self.members is None else self.members


@torch.inference_mode()
def predict_features(
    task: Task,
    model: BagModel,
    features: torch.Tensor | StoredFeatures,
    feed: SlideFeed,
    attention: bool = False,
    evidence: bool = False,
) -> SlideOutput:
    """Run `model`, in evaluation mode, over `features (N, D)`. The output has attention and evidence only if they are
    asked for; evidence also takes a model that gives it.

    Stored features of a full slide are streamed from their file, if the model can.
    """
    if isinstance(features, StoredFeatures) and not (feed.mode == "full" and streams(model)):
        features = features.whole()
    if isinstance(model, Ensemble):
        each = [predict_features(task, member, features, feed, attention, evidence) for member in model.models]
        return mean_output(each)
    with evaluating(model):
        cuts = _cuts(features, feed)
        bags = _cut(features, cuts)
        if isinstance(model, MergeableModel):
            return _merged_output(task, model, bags, cuts, attention, evidence and model.gives_evidence)
        tensors = [bag for bag in bags if isinstance(bag, torch.Tensor)]
        return _stitched_output(task, model, tensors, cuts, attention, evidence and model.gives_evidence)


def set_references(
    model: BagModel,
    slides: Callable[[], Iterable[torch.Tensor]],
    feed: SlideFeed,
    weights: Iterable[float] = itertools.repeat(1.0),
) -> None:
    """Keep the mean pooled embedding of the slides, each `(N, D)`, in a model, or in each member of an ensemble, as
    what its evidence begins at; by default all slides have the same weight. Of a model that does not merge it is their
    mean patch. A model without evidence is left as it is.
    """
    for member in members_of(model):
        if not member.gives_evidence:
            continue
        if not isinstance(member, MergeableModel):
            member.pooled_reference = _mean_patch(slides(), weights).to(next(member.parameters()))
        else:
            chunks = (_read(member, _cut(features, _cuts(features, feed)), keep_traces=False) for features in slides())
            with evaluating(member):
                member.pooled_reference = mean_pooled(member, chunks, weights)


def _mean_patch(slides: Iterable[torch.Tensor], weights: Iterable[float]) -> torch.Tensor:
    """Return the weighted mean `(1, D)` of the slides' mean patches."""
    means = torch.stack([slide.mean(dim=0, dtype=torch.float64).cpu() for slide in slides])
    shares = torch.tensor(list(itertools.islice(weights, len(means))), dtype=torch.float64)
    return (shares / shares.sum()).unsqueeze(0) @ means


def _merged_output(
    task: Task,
    model: MergeableModel,
    bags: Sequence[torch.Tensor | StoredFeatures],
    cuts: Sequence[Cut],
    attention: bool,
    evidence: bool,
) -> SlideOutput:
    """Return the output of a model that merges. Its attention is that of the slide as one bag, however it was fed."""
    chunks = _read(model, bags, keep_traces=attention or evidence)
    sizes = np.array([chunk.size for chunk in chunks])
    each = np.stack([task.activate(model.classify(chunk.summary)[0]) for chunk in chunks])
    order, weights, slide_evidence = _order(cuts), None, None
    if attention:
        whole = merged(chunks)
        weights = _in_place(model.attention(whole.summary, whole.traced)[0], order)
    if evidence:
        slide_evidence = _ordered(evidence_of(task, model, chunks), order)
    return SlideOutput(_mean(each, sizes), each, sizes, weights, evidence=slide_evidence)


def _stitched_output(
    task: Task,
    model: BagModel,
    bags: Sequence[torch.Tensor],
    cuts: Sequence[Cut],
    attention: bool,
    evidence: bool,
) -> SlideOutput:
    """Return the output of a model that does not merge. The attention of its chunks is put together, each chunk in
    proportion to its size.
    """
    device = next(model.parameters()).device
    bags = [bag.to(device) for bag in bags]
    answers = [model(bag[None]) for bag in bags]
    each = np.stack([task.activate(logits[0]) for logits, _ in answers])
    sizes = np.array([len(bag) for bag in bags])
    rows = [
        attn[0].float() * (len(bag) / sizes.sum())
        for bag, (_, aux) in zip(bags, answers, strict=True)
        if attention and (attn := aux["attn"]) is not None
    ]
    weights = _in_place(torch.cat(rows, dim=1), _order(cuts)) if len(rows) == len(bags) else None
    found = _ordered(gradient_evidence(task, model, bags), _order(cuts)) if evidence else None
    return SlideOutput(_mean(each, sizes), each, sizes, weights, evidence=found)


def _cuts(features: torch.Tensor | StoredFeatures, feed: SlideFeed) -> list[Cut]:
    chunk_size = None if feed.aggregation == "merge" else feed.chunk_size
    return cut_chunks(len(features), chunk_size, sequential=feed.sequential)


def _cut(features: torch.Tensor | StoredFeatures, cuts: Sequence[Cut]) -> Sequence[torch.Tensor | StoredFeatures]:
    return [features] if isinstance(features, StoredFeatures) else [take(features, cut) for cut in cuts]


def _read(model: MergeableModel, bags: Iterable[torch.Tensor | StoredFeatures], *, keep_traces: bool) -> list[ReadBag]:
    return [ReadBag.read(model, partial(blocks_of, bag, model), len(bag), keep_traces) for bag in bags]


def _mean(each: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the mean of the chunks' values by size; those of a single chunk to the last digit."""
    return each[0] if len(each) == 1 else np.average(each, axis=0, weights=sizes)


def _order(cuts: Sequence[Cut]) -> torch.Tensor | None:
    """Return the patches of a slide in the order of its chunks, `(N,)`; None if that is their own order."""
    return None if len(cuts) == 1 else torch.cat([torch.as_tensor(cut) for cut in cuts])


def _in_place(values: torch.Tensor, order: torch.Tensor | None) -> np.ndarray:
    """Return `values (..., N)` of patches, which are in this order, in that of the slide."""
    values = values.float().cpu()
    if order is None:
        return values.numpy()
    placed = torch.empty_like(values)
    placed[..., order] = values
    return placed.numpy()


def _ordered(evidence: Evidence, order: torch.Tensor | None) -> Evidence:
    """Return the evidence in patches, which are in this order, in that of the slide."""
    return replace(evidence, contributions=_in_place(torch.from_numpy(evidence.contributions), order))


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
    return all(isinstance(member, MergeableModel) for member in members_of(model))


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
    evidence = [output.evidence for output in outputs if output.evidence is not None]
    if len({len(weights) for weights in attentions}) > 1:
        attentions = [weights.mean(axis=0, keepdims=True) for weights in attentions]
    return SlideOutput(
        members.mean(axis=0),
        np.average([output.chunk_probabilities for output in outputs], axis=0, weights=counts),
        outputs[0].chunk_sizes,
        np.average(attentions, axis=0, weights=counts).astype(np.float32) if len(attentions) == len(outputs) else None,
        members,
        mean_evidence(evidence, counts) if len(evidence) == len(outputs) else None,
    )


def mean_calibrated(
    task: Task, outputs: Sequence[SlideOutput], fitted: Sequence[FittedFigures | None]
) -> np.ndarray | None:
    """Return a slide's values `(C,)`: each model's, calibrated by what was `fitted` with it, then averaged; None unless
    all are calibrated.
    """
    scaled = [
        calibrated
        for output, figures in zip(outputs, fitted, strict=True)
        if figures is not None and (calibrated := task.calibrate(figures, output.each)) is not None
    ]
    return np.concatenate(scaled).mean(axis=0) if len(scaled) == len(outputs) else None
