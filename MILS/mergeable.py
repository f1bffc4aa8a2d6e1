"""Models that are a map and a merge.

A mergeable model embeds each instance (the map), reduces the instances to a small summary (the merge) and classifies
the summary. The summary of two blocks of instances is the merge of their summaries, so one implementation serves a
batch of small bags, which is a single block, and a slide of any length, which goes through block by block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from MILS.bag_model import Aux, BagModel, ModelError, evaluating
from MILS.streaming import STREAMED_DEVICES, Joined, blocks_of, stream
from MILS.summaries import AttentionSummary, attend

# Instances in a block, by type of device. On a CPU a block's embeddings stay in its cache, and blocks are few, for the
# threads wait for each other at the end of each, long beside other processes. An accelerator wants few large products.
BLOCK_ROWS = defaultdict(lambda: 2**16, cpu=2048)
# Instances whose embeddings wait together to be reduced group by group: there may be many groups.
GROUPED_ROWS = 2**14
# A bag of more instances keeps nothing of their embeddings for the way back.
SAVED_ROWS = 2**18


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
