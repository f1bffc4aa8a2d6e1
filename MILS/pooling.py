"""What the models share: the contract of a bag model, the map and the merge, the layers before and after.

A bag model embeds each instance (the map), reduces the instances to a small summary (the merge) and classifies the
summary. The summary of two blocks of instances is the merge of their summaries, so one implementation serves a padded
batch, which is a single block, and a slide of any length that streams through in blocks.

Shapes: B bags, N instances, D input features, d embedding, C classes, H attention heads, R rows of attention weights
(R = H, or heads x queries).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from MILS.registry import ModelError, check_options, is_whole

Aux = dict[str, Tensor | None]


class BagModel(nn.Module):
    """Base of every model: `model(x, mask=None) -> (logits, aux)`.

    x (B, N, D), any float type; mask (B, N) bool, True = padding, or None; logits (B, C); aux["attn"] (B, H, N), which
    sums to 1 over the real instances of a bag and is 0 on its padding. What stands in the padding, how much of it there
    is and which bags share the batch change nothing.

    A subclass hands its hyperparameters to `super().__init__`, which checks and remembers them: `model.spec` rebuilds
    the model with `build_mil(**model.spec)`. `mergeable` tells whether the model has `forward_blocks`.
    """

    mergeable: ClassVar[bool] = False

    def __init__(self, input_dim: int, num_classes: int, **hyperparameters: Any) -> None:
        super().__init__()
        self.require(is_whole(input_dim) and input_dim >= 1, f"input_dim must be at least 1, got {input_dim!r}")
        self.require(is_whole(num_classes) and num_classes >= 2, f"num_classes must be at least 2, got {num_classes!r}")
        check_options(type(self), hyperparameters)
        self.input_dim = input_dim
        self.num_classes = num_classes
        self.hyperparameters = hyperparameters

    @property
    def spec(self) -> dict[str, Any]:
        """JSON-able arguments of `build_mil` that make this model again, its weights aside."""
        return {
            "name": type(self).__name__,
            "input_dim": self.input_dim,
            "num_classes": self.num_classes,
            **self.hyperparameters,
        }

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def require(self, condition: bool, message: str) -> None:
        """Raise a ModelError that opens with the model's name unless `condition` holds."""
        if not condition:
            raise ModelError(f"{type(self).__name__}: {message}")

    def check_bags(self, x: Tensor, mask: Tensor | None) -> None:
        """Raise ModelError unless x and mask are what `forward` takes and every bag has a real instance."""
        self.require(
            x.dim() == 3 and x.shape[2] == self.input_dim and x.is_floating_point(),
            f"x must be a float tensor (B, N, {self.input_dim}), got {x.dtype} {tuple(x.shape)}",
        )
        self.require(x.shape[0] > 0 and x.shape[1] > 0, f"no instance in x of shape {tuple(x.shape)}")
        if mask is None:
            return
        self.require(
            mask.dtype is torch.bool and mask.shape == x.shape[:2],
            f"mask must be a bool tensor {tuple(x.shape[:2])}, True = padding, got {mask.dtype} {tuple(mask.shape)}",
        )
        # One look at the result, hence one wait for the device, on the way that is not an error.
        empty = mask.all(dim=1)
        if empty.any():
            bags = ", ".join(map(str, empty.nonzero().flatten().tolist()))
            raise ModelError(
                f"{type(self).__name__}: all {x.shape[1]} instances are padding in bag {bags} of the batch"
            )

    def cast(self, x: Tensor) -> Tensor:
        """x in the type the first layer wants: the parameters' own, or left to autocast where that is on."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
            return x
        return x.to(self.dtype)


class Summary(Protocol):
    """What is left of a block of instances; `merge` is associative, the blocks in their order."""

    def merge(self, other: Self) -> Self: ...


S = TypeVar("S", bound=Summary)


class MergeableModel(BagModel, Generic[S]):
    """A bag model that is a map and a merge. A subclass writes `summarise`, `classify` and `attention`."""

    mergeable = True

    def summarise(self, x: Tensor, mask: Tensor | None) -> tuple[S, Tensor]:
        """Map and reduce one block x (B, n, D): its summary, and the trace (B, R, n) `attention` is made from."""
        raise NotImplementedError

    def classify(self, summary: S) -> Tensor:
        """Logits (B, C)."""
        raise NotImplementedError

    def attention(self, summary: S, trace: Tensor) -> Tensor:
        """Attention (B, H, N) from the summary of the whole bag and the traces (B, R, N) of its blocks, joined."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Aux]:
        self.check_bags(x, mask)
        if mask is not None:
            # Weight 0 alone would not do: 0 x NaN is NaN, in the sum and in the gradients of the first layer.
            x = x.masked_fill(mask.unsqueeze(-1), 0)
        summary, trace = self.summarise(self.cast(x), mask)
        return self.classify(summary), {"attn": self.attention(summary, trace)}

    @torch.no_grad()
    def forward_blocks(self, blocks: Iterable[Tensor], *, attention: bool = True) -> tuple[Tensor, Aux]:
        """Predict one bag that arrives in blocks; equals one pass over their concatenation, to rounding.

        An inference path: no gradients, no dropout whatever mode the model is in. Memory is that of one block, plus the
        attention if it is kept.

        Arguments
            blocks: (n_i, D) float tensors, in the order of the instances, on any device; empty ones are skipped.
            attention: False leaves aux["attn"] None, and memory constant.

        Returns logits (1, C) and aux with "attn" (1, H, N). Raises ModelError for a bag without instances.
        """
        summary: S | None = None
        traces = []
        with evaluating(self):
            for block in blocks:
                if block.dim() == 2 and len(block) == 0:
                    continue
                x = block.unsqueeze(0)
                self.check_bags(x, None)
                part, trace = self.summarise(self.cast(x.to(next(self.parameters()).device)), None)
                summary = part if summary is None else summary.merge(part)
                if attention:
                    traces.append(trace)
            if summary is None:
                raise ModelError(f"{type(self).__name__}: no instance in any of the blocks")
            attn = self.attention(summary, torch.cat(traces, dim=-1)) if attention else None
            return self.classify(summary), {"attn": attn}


class AttentionSummary(NamedTuple):
    """A block under softmax attention, kept so that blocks can be merged (online softmax).

    maximum (B, R): the largest score; normaliser (B, R): the sum of exp(score - maximum); kept (B, R): the same sum
    after attention dropout; total (B, R, d): the sum of the values under the weights after dropout.
    """

    maximum: Tensor
    normaliser: Tensor
    kept: Tensor
    total: Tensor

    def merge(self, other: AttentionSummary) -> AttentionSummary:
        maximum = torch.maximum(self.maximum, other.maximum)
        ours, theirs = torch.exp(self.maximum - maximum), torch.exp(other.maximum - maximum)
        return AttentionSummary(
            maximum,
            ours * self.normaliser + theirs * other.normaliser,
            ours * self.kept + theirs * other.kept,
            ours.unsqueeze(-1) * self.total + theirs.unsqueeze(-1) * other.total,
        )

    def pooled(self) -> Tensor:
        """The values' weighted sum (B, R, d)."""
        return self.total / self.normaliser.unsqueeze(-1)

    def mass(self) -> Tensor:
        """The sum (B, R) of the weights: 1, but under attention dropout."""
        return self.kept / self.normaliser

    def weights(self, scores: Tensor) -> Tensor:
        """The weights (B, R, N), before dropout, of instances with these scores."""
        return torch.exp(scores - self.maximum.unsqueeze(-1)) / self.normaliser.unsqueeze(-1)


def attend(
    scores: Tensor, values: Tensor, mask: Tensor | None, dropout: nn.Module | None = None
) -> tuple[AttentionSummary, Tensor]:
    """Reduce values (B, N, d) under the softmax over N of scores (B, R, N).

    Returns the summary and the scores with the padding's at the lowest number there is: the padding then has weight
    exactly 0, and a block that is nothing but padding merges as nothing. `dropout` acts on the weights (B, R, N).
    """
    # Unnormalised weights sum to as much as N: more than half precision can hold.
    scores = at_least_single(scores)
    if mask is not None:
        scores = scores.masked_fill(mask.unsqueeze(1), torch.finfo(scores.dtype).min)
    maximum = scores.detach().amax(dim=-1)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    normaliser = kept = weights.sum(dim=-1)
    if dropout is not None and dropout.training:
        weights = dropout(weights)
        kept = weights.sum(dim=-1)
    with full_precision(weights):
        total = weights @ values.to(weights.dtype)
    return AttentionSummary(maximum, normaliser, kept, total), scores


class AttentionModel(MergeableModel[AttentionSummary]):
    """A mergeable model whose summary is an attention-weighted sum. A subclass writes `embed`, `score`, `classify`."""

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings (B, N, d) of instances x (B, N, D)."""
        raise NotImplementedError

    def score(self, h: Tensor) -> Tensor:
        """Scores (B, R, N) of embeddings h (B, N, d): the attention before its softmax."""
        raise NotImplementedError

    def summarise(self, x: Tensor, mask: Tensor | None) -> tuple[AttentionSummary, Tensor]:
        h = self.embed(x)
        return attend(self.score(h), h, mask)

    def attention(self, summary: AttentionSummary, trace: Tensor) -> Tensor:
        return summary.weights(trace)


class MaxSummary(NamedTuple):
    """A block under the maximum over instances.

    maximum (B, d); winner (B, d): the first instance that supplies it, counted from the block's start; length: the
    block's number of instances.
    """

    maximum: Tensor
    winner: Tensor
    length: int

    def merge(self, other: MaxSummary) -> MaxSummary:
        later = other.maximum > self.maximum
        return MaxSummary(
            torch.where(later, other.maximum, self.maximum),
            torch.where(later, other.winner + self.length, self.winner),
            self.length + other.length,
        )


def embedding(input_dim: int, hidden_dim: int, dropout: float) -> nn.Sequential:
    """Linear, LayerNorm, ReLU, Dropout: (B, N, D) -> (B, N, d)."""
    return nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.ReLU(), nn.Dropout(dropout))


def mlp_head(hidden_dim: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Linear to half the width, GELU, Dropout, Linear: (B, d) -> (B, C)."""
    half = hidden_dim // 2
    return nn.Sequential(nn.Linear(hidden_dim, half), nn.GELU(), nn.Dropout(dropout), nn.Linear(half, num_classes))


def at_least_single(x: Tensor) -> Tensor:
    """x, in single precision if it is in half."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(like: Tensor) -> torch.autocast:
    """Context without autocast on the device of `like`."""
    return torch.autocast(like.device.type, enabled=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context with `model` in evaluation mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
