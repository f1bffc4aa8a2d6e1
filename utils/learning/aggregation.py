"""From a slide's features to the slide's answer: the one function that validation, test and prediction share.

`mean`: the instance-weighted mean of the chunks' probabilities. `merge`: the exact answer for the slide as one bag,
streamed in blocks for every model that can.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from MILS.ensemble import Ensemble
from MILS.pooling import BagModel, MergeableModel, evaluating
from utils.bags.collate import Cut, cut_chunks, take


@dataclass(frozen=True)
class SlideFeed:
    """How a slide is fed: `chunk_size` None is the whole slide; `aggregation` "mean" or "merge"; chunks are runs of
    neighbours (`sequential`), or each spread over the slide.
    """

    chunk_size: int | None
    aggregation: str
    sequential: bool = False

    @classmethod
    def of_mode(cls, mode: str, chunk_size: int, sequential: bool = False) -> "SlideFeed":
        """Chunked slides are averaged, full ones merged."""
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
    """`probabilities (C,)` of the slide; `chunk_probabilities (K, C)` and `chunk_sizes (K,)` of its chunks;
    `attention (H, N)`, per head summing to 1 over the slide, or None; `members (M, C)`, what each of an ensemble's
    models says by itself, or None of a single one.
    """

    probabilities: np.ndarray
    chunk_probabilities: np.ndarray
    chunk_sizes: np.ndarray
    attention: np.ndarray | None
    members: np.ndarray | None = None


@torch.inference_mode()
def predict_features(model: BagModel, features: torch.Tensor, feed: SlideFeed, attention: bool = False) -> SlideOutput:
    """Run `model` (in evaluation mode) over `features (N, D)`; `attention` asks for the weights too."""
    if isinstance(model, Ensemble):
        return _mean([predict_features(member, features, feed, attention) for member in model.models])
    with evaluating(model):
        cuts = cut_chunks(len(features), feed.chunk_size, sequential=feed.sequential)
        chunks = [_predict_bag(model, take(features, cut), attention) for cut in cuts]
        sizes = np.array([len(cut) for cut in cuts])
        each = np.stack([probabilities for probabilities, _ in chunks])
        whole = chunks[0] if len(cuts) == 1 else None
        if whole is None and feed.aggregation == "merge":
            whole = _predict_bag(model, features, attention)
        if whole is not None:
            return SlideOutput(whole[0], each, sizes, whole[1])
        weights = _spread([weights for _, weights in chunks], cuts, len(features)) if attention else None
        return SlideOutput(np.average(each, axis=0, weights=sizes), each, sizes, weights)


def _mean(outputs: Sequence[SlideOutput]) -> SlideOutput:
    """The mean of several models' answers for one slide, which they were fed in the same chunks."""
    known = [output.attention for output in outputs if output.attention is not None]
    members = np.stack([output.probabilities for output in outputs])
    return SlideOutput(
        members.mean(axis=0),
        np.mean([output.chunk_probabilities for output in outputs], axis=0),
        outputs[0].chunk_sizes,
        np.mean(known, axis=0) if len(known) == len(outputs) else None,
        members,
    )


def _predict_bag(model: BagModel, features: torch.Tensor, attention: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Probabilities `(C,)` in float64 and attention `(H, N)` of one bag."""
    if isinstance(model, MergeableModel):
        logits, aux = model.forward_blocks([features], attention=attention)
    else:
        logits, aux = model(features.to(next(model.parameters()).device)[None])
    attn = aux["attn"] if attention else None
    weights = None if attn is None else attn[0].float().cpu().numpy()
    return torch.softmax(logits[0].cpu().double(), dim=0).numpy(), weights


def _spread(weights: list[np.ndarray | None], cuts: list[Cut], num_instances: int) -> np.ndarray | None:
    """The chunks' attention as one distribution over the slide, each chunk in proportion to its size."""
    known = [part for part in weights if part is not None]
    if len(known) < len(cuts):
        return None
    spread = np.empty((known[0].shape[0], num_instances), dtype=np.float32)
    for part, cut in zip(known, cuts, strict=True):
        spread[:, cut] = part * (len(cut) / num_instances)
    return spread
