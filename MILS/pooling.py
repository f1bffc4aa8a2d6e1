"""What the models share: the contract of a bag model, the map and the merge.

A bag model embeds each instance (the map), reduces the instances to a small summary (the merge) and classifies the
summary. The summary of two blocks of instances is the merge of their summaries, so one implementation serves a batch of
small bags, which is a single block, and a slide of any length, which goes through block by block.

Shapes: B bags, N instances, D input features, d embedding, C classes, H attention heads, R rows of attention weights
(R = H, or heads x queries).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from MILS.layers import at_least_single, full_precision
from MILS.registry import ModelError, check_options, is_whole
from MILS.streaming import STREAMED_DEVICES, Joined, blocks_of, stream

Aux = dict[str, Tensor | None]

# Instances in a block, by type of device. On a CPU a block's embeddings stay in its cache, and blocks are few, for the
# threads wait for each other at the end of each, long beside other processes. An accelerator wants few large products.
BLOCK_ROWS = defaultdict(lambda: 2**16, cpu=2048)
# Small bags are padded to each other's length while they make no more than so many rows: beyond that the copy costs
# more than the calls.
PADDED_ROWS = defaultdict(lambda: 2**15, cpu=768)
# Instances whose embeddings wait together to be reduced group by group: there may be many groups.
GROUPED_ROWS = 2**14
# A bag of more instances keeps nothing of their embeddings for the way back.
SAVED_ROWS = 2**18
# The buffers of a model that standardises its features.
_SCALE = ("feature_mean", "feature_std")


class BagModel(nn.Module):
    """Base of every model: `model(x, mask=None) -> (logits, aux)`.

    x (B, N, D), any float type; mask (B, N) bool, True = padding, or None; logits (B, C); aux["attn"] (B, H, N), which
    sums to 1 over the real instances of a bag and is 0 on its padding. What stands in the padding, how much of it there
    is and which bags share the batch change nothing.

    A subclass hands its hyperparameters to `super().__init__`, which checks and remembers them: `model.spec` rebuilds
    the model with `build_mil(**model.spec)`. Its forward takes x through `cast`, which also standardises features where
    that was set (`set_feature_scale`): the map is part of the weights, and needs no word where the model is used.
    """

    feature_mean: Tensor | None
    feature_std: Tensor | None

    def __init__(self, input_dim: int, num_classes: int, **hyperparameters: Any) -> None:
        super().__init__()
        self.require(is_whole(input_dim) and input_dim >= 1, f"input_dim must be at least 1, got {input_dim!r}")
        self.require(is_whole(num_classes) and num_classes >= 2, f"num_classes must be at least 2, got {num_classes!r}")
        check_options(type(self), hyperparameters)
        self.input_dim = input_dim
        self.num_classes = num_classes
        self.hyperparameters = hyperparameters
        for name in _SCALE:
            self.register_buffer(name, None)

    def set_feature_scale(self, mean: Tensor | None, std: Tensor | None) -> None:
        """Standardise features from here on, `(x - mean) / std`, each (D,); None for both leaves them as they are."""
        like = next(self.parameters())
        for name, values in zip(_SCALE, (mean, std), strict=True):
            setattr(self, name, None if values is None else values.to(like.device, like.dtype))

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest is handed on
        self, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        for name in _SCALE:
            stored = state_dict.get(prefix + name)
            setattr(self, name, None if stored is None else torch.empty_like(stored))
        super()._load_from_state_dict(state_dict, prefix, *rest)

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

    def forward_bags(self, bags: Sequence[Tensor]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """A batch of bags of different lengths, each (n_i, D): costs what their instances cost.

        Returns logits (B, C) and aux with the entries `forward` has, a list of one (H, n_i) per bag. Equals the bags
        taken one by one. Raises ModelError for a bag without instances or of another shape.
        """
        self.require(len(bags) > 0, "no bag in the batch")
        for bag in bags:
            self.check_bags(bag.unsqueeze(0), None)
        logits: dict[int, Tensor] = {}
        aux: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for group in groups_to_pad([len(bag) for bag in bags], PADDED_ROWS[bags[0].device.type]):
            group_logits, group_aux = self(*padded([bags[i] for i in group]))
            for row, i in enumerate(group):
                logits[i] = group_logits[row]
                for key, values in group_aux.items():
                    if values is not None:
                        aux[key][i] = values[row, :, : len(bags[i])]
        order = range(len(bags))
        return torch.stack([logits[i] for i in order]), {key: [found[i] for i in order] for key, found in aux.items()}

    def cast(self, x: Tensor) -> Tensor:
        """x standardised, where that was set, in the type the first layer wants: the parameters' own, or left to
        autocast where that is on.
        """
        if self.feature_mean is not None and self.feature_std is not None:
            x = (x.to(torch.promote_types(x.dtype, self.feature_mean.dtype)) - self.feature_mean) / self.feature_std
        if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
            return x
        return x.to(self.dtype)


class Summary(Protocol):
    """What is left of a block of instances; `merge` is associative, the blocks in their order."""

    def merge(self, other: Self) -> Self: ...


S = TypeVar("S", bound=Summary)


class MergeableModel(BagModel, Generic[S]):
    """A bag model that is a map and a merge. A subclass writes `instance_layers`, `reduce`, `classify`, `attention`.

    A bag longer than a block goes through block by block: what is computed stays in the processor's cache, and memory
    small. Where gradients are wanted, such a bag keeps the product of the first layer and computes the rest again on
    the way back; beyond `SAVED_ROWS` instances it computes all of it again. Hooks on parameters then run once per
    block. Where x itself wants a gradient, a bag goes through in one piece, whatever memory that takes.
    """

    summary_type: ClassVar[type]

    def instance_layers(self) -> nn.Sequential:
        """The map, x (B, n, D) -> h (B, n, d); its first layer, an nn.Linear, is the one large product."""
        raise NotImplementedError

    def reduce(self, h: Tensor, mask: Tensor | None) -> tuple[S, Tensor]:
        """Summary of one block of embeddings h (B, n, d), and the trace (B, R, n) `attention` is made from."""
        raise NotImplementedError

    def classify(self, summary: S) -> Tensor:
        """Logits (B, C)."""
        raise NotImplementedError

    def attention(self, summary: S, trace: Tensor) -> Tensor:
        """Attention (B, H, N) from the summary of the whole bag and the traces (B, R, N) of its blocks, joined."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Aux]:
        self.check_bags(x, mask)
        together = max(1, BLOCK_ROWS[x.device.type] // x.shape[1])
        bags = x.split(together)
        masks = [None] * len(bags) if mask is None else mask.split(together)
        answers = [self._forward_blockwise(*pair) for pair in zip(bags, masks, strict=True)]
        return torch.cat([logits for logits, _ in answers]), {"attn": torch.cat([attn for _, attn in answers])}

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
        with evaluating(self):
            summary, trace = self._merged((self._summarise(block, None) for block in self._cut(blocks)), attention)
            return self.classify(summary), {"attn": None if trace is None else self.attention(summary, trace)}

    @torch.no_grad()
    def summaries(self, blocks: Iterable[Tensor], groups: Tensor) -> list[list[S]]:
        """One bag that arrives in blocks, reduced group by group, for several groupings of its instances in one pass.

        An inference path, as `forward_blocks`: `merge` and `classify` then tell what the model says of any union of
        groups.

        Arguments
            blocks: as for `forward_blocks`, N instances in all.
            groups: (O, N) integers, of each of O groupings every instance's group, counted from 0, none empty.

        Returns, per grouping, the groups' summaries in their order.
        """
        found: list[dict[int, S]] = [{} for _ in groups]
        waiting: list[Tensor] = []
        start = 0

        def reduce_waiting() -> None:
            h = torch.cat(waiting, dim=1)
            waiting.clear()
            for known, row in zip(found, groups[:, start : start + h.shape[1]], strict=True):
                present, sizes = row.unique(return_counts=True)
                sorted_h = h[:, row.argsort(stable=True).to(h.device)]
                for group, part in zip(present.tolist(), sorted_h.split(sizes.tolist(), dim=1), strict=True):
                    summary, _ = self.reduce(part, None)
                    known[group] = known[group].merge(summary) if group in known else summary

        with evaluating(self):
            for block in self._cut(blocks):
                waiting.append(self.instance_layers()(self.prepared(block, None)))
                rows = sum(part.shape[1] for part in waiting)
                if rows >= GROUPED_ROWS:
                    reduce_waiting()
                    start += rows
            if waiting:
                reduce_waiting()
        return [[known[group] for group in sorted(known)] for known in found]

    def _cut(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The blocks, checked, in pieces (1, n, D) of the size that suits the model's device, on that device."""
        device = next(self.parameters()).device
        for block in blocks:
            if block.dim() == 2 and len(block) == 0:
                continue
            self.check_bags(block.unsqueeze(0), None)
            for piece in block.split(BLOCK_ROWS[device.type]):
                yield piece.to(device).unsqueeze(0)

    def _forward_blockwise(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits and attention of bags x (B, N, D) that make a block together, or of one bag of any length."""
        rows = BLOCK_ROWS[x.device.type]
        if x.shape[1] > rows and torch.is_grad_enabled():
            if x.device.type in STREAMED_DEVICES and not x.requires_grad and self._owns_first_layer():
                summary, trace = stream(self, x, mask, rows, keep_products=x.shape[1] <= SAVED_ROWS)
                return self.classify(summary), self.attention(summary, trace)
            rows = x.shape[1]
        summary, trace = self._merged(self._summarise(*pair) for pair in blocks_of(x, mask, rows))
        assert trace is not None  # noqa: S101 - for the type checker: it was kept
        return self.classify(summary), self.attention(summary, trace)

    def _owns_first_layer(self) -> bool:
        """Whether the first layer's weights are parameters themselves, and not computed from others."""
        own = {id(parameter) for parameter in self.parameters()}
        return {id(self.instance_layers()[0].weight), id(self.instance_layers()[0].bias)} <= own

    def _merged(self, parts: Iterable[tuple[S, Tensor]], keep_traces: bool = True) -> tuple[S, Tensor | None]:
        """The summary of a bag from the summaries of its blocks, and their traces joined, if they are kept."""
        summary: S | None = None
        traces = Joined()
        for part, trace in parts:
            summary = part if summary is None else summary.merge(part)
            if keep_traces:
                traces.append(trace)
        if summary is None:
            raise ModelError(f"{type(self).__name__}: no instance in any of the blocks")
        return summary, traces.tensor

    def _summarise(self, x: Tensor, mask: Tensor | None) -> tuple[S, Tensor]:
        return self.summarise_product(self.product(self.prepared(x, mask)), mask)

    def prepared(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, n, D) as the first layer takes it, standardised where that was set."""
        if mask is not None:
            # Weight 0 alone would not do: 0 x NaN is NaN, in the sum and in the gradients of the first layer.
            x = x.masked_fill(mask.unsqueeze(-1), 0)
        return self.cast(x)

    def product(self, x: Tensor) -> Tensor:
        """The first layer: y (B, n, d)."""
        return self.instance_layers()[0](x)

    def summarise_product(self, y: Tensor, mask: Tensor | None) -> tuple[S, Tensor]:
        """All that follows on the first layer, for one block: its summary and trace."""
        return self.reduce(self.instance_layers()[1:](y), mask)


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
        return (scores - (self.maximum + self.normaliser.log()).unsqueeze(-1)).exp_()


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
    """A mergeable model whose summary is an attention-weighted sum. A subclass writes `instance_layers`, `score`,
    `classify`.
    """

    summary_type = AttentionSummary

    def score(self, h: Tensor) -> Tensor:
        """Scores (B, R, N) of embeddings h (B, N, d): the attention before its softmax."""
        raise NotImplementedError

    def reduce(self, h: Tensor, mask: Tensor | None) -> tuple[AttentionSummary, Tensor]:
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
    length: Tensor

    def merge(self, other: MaxSummary) -> MaxSummary:
        later = other.maximum > self.maximum
        return MaxSummary(
            torch.where(later, other.maximum, self.maximum),
            torch.where(later, other.winner + self.length, self.winner),
            self.length + other.length,
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context with `model` in evaluation mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def groups_to_pad(lengths: Sequence[int], most_rows: int) -> Iterator[list[int]]:
    """Indices of bags to pad to one length, like with like: at most `most_rows` rows each, or a single bag.

    Beyond 64 rows no bag is padded to more than one and a half times its length.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[group[0]] if group else 0
        if group and ((len(group) + 1) * longest > most_rows or longest > max(64, 1.5 * lengths[i])):
            yield group
            group = []
        group.append(i)
    yield group


def padded(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Bags (n_i, D), the longest first, as x (B, n_0, D) and its mask, which is None where all are of one length."""
    if len(bags) == 1:
        return bags[0].unsqueeze(0), None
    lengths = torch.tensor([len(bag) for bag in bags], device=bags[0].device)
    dtype = functools.reduce(torch.promote_types, (bag.dtype for bag in bags))
    x = nn.utils.rnn.pad_sequence([bag.to(dtype) for bag in bags], batch_first=True)
    if len(bags[-1]) == len(bags[0]):
        return x, None
    return x, torch.arange(len(bags[0]), device=x.device) >= lengths.unsqueeze(1)
