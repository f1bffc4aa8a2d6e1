"""Models that consist of a map and a merge.

A mergeable model embeds each instance (the map), reduces the instances to a small summary (the merge) and classifies
the summary. The summary of two blocks of instances is the merge of their summaries, so one implementation serves both a
batch of small bags, which is a single block, and a slide of any length, which is processed block by block.
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

# Instances in a block, by type of device. On a CPU a block's embeddings fit in the cache, yet blocks are few, since the
# threads wait for each other after each, longer if other processes run. An accelerator needs few large products.
BLOCK_ROWS = defaultdict(lambda: 2**16, cpu=2048)
# Instances whose embeddings are collected before they are reduced group by group: there may be many groups.
GROUPED_ROWS = 2**14
# A bag of more instances saves nothing of their embeddings for the backward pass.
SAVED_ROWS = 2**18


class Summary(Protocol):
    """A block of instances reduced to a fixed size; `merge` is associative, with the blocks in their order."""

    def merge(self, other: Self) -> Self: ...


S = TypeVar("S", bound=Summary)


class MergeableModel(BagModel, Generic[S]):
    """A bag model that consists of a map and a merge. A subclass defines `instance_layers`, `reduce`, `classify` and
    `attention`; to give evidence (`MILS.evidence`), also `pooled`, `classify_pooled` and `contributions`.

    A bag longer than a block is processed block by block, so that results stay in the processor's cache and memory
    stays small. If gradients are needed, the product of the first layer is saved and the rest computed again in the
    backward pass; beyond `SAVED_ROWS` instances all is computed again. Hooks on parameters then run once per block. If
    x itself needs a gradient, a bag is processed in one piece, whatever memory that takes.
    """

    summary_type: ClassVar[type]

    def instance_layers(self) -> nn.Sequential:
        """The map, x (B, n, D) -> h (B, n, d); its first layer, an nn.Linear, is the one large product."""
        raise NotImplementedError

    def reduce(self, h: Tensor, mask: Tensor | None) -> tuple[S, Tensor]:
        """Return the summary of a block of embeddings h (B, n, d), and the trace (B, R, n) for `attention`."""
        raise NotImplementedError

    def classify(self, summary: S) -> Tensor:
        """Return logits (B, C)."""
        raise NotImplementedError

    def attention(self, summary: S, trace: Tensor) -> Tensor:
        """Return attention (B, H, N), given the summary of the whole bag and its blocks' joined traces (B, R, N)."""
        raise NotImplementedError

    @property
    def gives_evidence(self) -> bool:
        """Whether the model says what each instance contributes."""
        return type(self).contributions is not MergeableModel.contributions

    def pooled(self, summary: S) -> Tensor:
        """Return the pooled embedding (B, R, d) of a bag."""
        raise NotImplementedError

    def classify_pooled(self, pooled: Tensor) -> Tensor:
        """Return the logits (B, C) of pooled embeddings (B, R, d), those of `classify`."""
        raise NotImplementedError

    def contributions(
        self, blocks: Iterable[Tensor], summary: S, trace: Tensor, slopes: Tensor, reference: Tensor
    ) -> Tensor:
        """Return what each instance of a bag contributes to A answers, (A, N): over N they add up to
        `slopes * (pooled - reference)` (see `MILS.evidence`).

        Arguments
            blocks: as for `read_blocks`, which gave the summary and the trace (1, R, N).
            slopes: (A, R, d), the answers' mean gradients with respect to the pooled embedding.
            reference: (R, d), where the contributions begin.
        """
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
        """Predict one bag that arrives in blocks; equals one pass over their concatenation, up to rounding.

        For inference only: no gradients, and no dropout whatever mode the model is in. Memory is that of one block,
        plus the attention if it is returned.

        Arguments
            blocks: (n_i, D) float tensors, in the order of the instances, on any device; empty ones are skipped.
            attention: False makes aux["attn"] None, and memory independent of the bag.

        Returns logits (1, C) and aux with "attn" (1, H, N). Raises ModelError for a bag without instances.
        """
        with evaluating(self):
            summary, trace = self.read_blocks(blocks, attention)
            return self.classify(summary), {"attn": None if trace is None else self.attention(summary, trace)}

    @torch.no_grad()
    def read_blocks(self, blocks: Iterable[Tensor], keep_traces: bool = True) -> tuple[S, Tensor | None]:
        """Return the summary of one bag that arrives in blocks, as for `forward_blocks`, and its trace (1, R, N) if
        that is kept.
        """
        with evaluating(self):
            return self._merged((self._summarise(block, None) for block in self._cut(blocks)), keep_traces)

    def _embedded(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        for block in self._cut(blocks):
            yield self.instance_layers()(self.prepared(block, None))[0]

    @torch.no_grad()
    def mean_embedding(self, blocks: Iterable[Tensor]) -> Tensor:
        """Return the mean (d,) over a bag's embedded instances."""
        total, count = None, 0
        with evaluating(self):
            for h in self._embedded(blocks):
                block_total = h.sum(dim=0).cpu().double()  # mps has no float64
                total, count = block_total if total is None else total + block_total, count + len(h)
        if total is None:
            raise ModelError(f"{type(self).__name__}: no instance in any of the blocks")
        return (total / count).to(next(self.parameters()))

    @torch.no_grad()
    def summaries(self, blocks: Iterable[Tensor], groups: Tensor) -> list[list[S]]:
        """Reduce one bag that arrives in blocks group by group, for several groupings of its instances in one pass.

        For inference only, as `forward_blocks`: `merge` and `classify` then give the prediction for any union of
        groups.

        Arguments
            blocks: as for `forward_blocks`, N instances in all.
            groups: (O, N) integers, the group of every instance in each of O groupings, from 0 on, none empty.

        Returns, per grouping, the groups' summaries in their order.
        """
        groupings: list[dict[int, S]] = [{} for _ in groups]
        waiting: list[Tensor] = []
        start = 0

        def reduce_waiting() -> None:
            h = torch.cat(waiting, dim=1)
            waiting.clear()
            for summary_of, row in zip(groupings, groups[:, start : start + h.shape[1]], strict=True):
                present, sizes = row.unique(return_counts=True)
                sorted_h = h[:, row.argsort(stable=True).to(h.device)]
                for group, group_h in zip(present.tolist(), sorted_h.split(sizes.tolist(), dim=1), strict=True):
                    summary, _ = self.reduce(group_h, None)
                    summary_of[group] = summary_of[group].merge(summary) if group in summary_of else summary

        with evaluating(self):
            for block in self._cut(blocks):
                waiting.append(self.instance_layers()(self.prepared(block, None)))
                rows = sum(h.shape[1] for h in waiting)
                if rows >= GROUPED_ROWS:
                    reduce_waiting()
                    start += rows
            if waiting:
                reduce_waiting()
        return [[summary_of[group] for group in sorted(summary_of)] for summary_of in groupings]

    def _cut(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Check the blocks; yield them in pieces (1, n, D) of the size for the model's device, on that device."""
        device = next(self.parameters()).device
        for block in blocks:
            if block.dim() == 2 and len(block) == 0:
                continue
            self.check_bags(block.unsqueeze(0), None)
            for piece in block.split(BLOCK_ROWS[device.type]):
                yield piece.to(device).unsqueeze(0)

    def _forward_blockwise(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return logits and attention of bags x (B, N, D) that together fit in a block, or of one bag of any length."""
        rows = BLOCK_ROWS[x.device.type]
        if x.shape[1] > rows and torch.is_grad_enabled():
            if x.device.type in STREAMED_DEVICES and not x.requires_grad and self._owns_first_layer():
                summary, trace = stream(self, x, mask, rows, keep_products=x.shape[1] <= SAVED_ROWS)
                return self.classify(summary), self.attention(summary, trace)
            rows = x.shape[1]
        summary, trace = self._merged(self._summarise(*pair) for pair in blocks_of(x, mask, rows))
        assert trace is not None  # noqa: S101 - for the type checker: traces are joined by default
        return self.classify(summary), self.attention(summary, trace)

    def _owns_first_layer(self) -> bool:
        """Return whether the first layer's weights are parameters themselves, not computed from others."""
        own = {id(parameter) for parameter in self.parameters()}
        return {id(self.instance_layers()[0].weight), id(self.instance_layers()[0].bias)} <= own

    def _merged(self, summaries: Iterable[tuple[S, Tensor]], keep_traces: bool = True) -> tuple[S, Tensor | None]:
        """Return the merged summary of a bag's blocks, and their joined traces if these are kept, else None."""
        summary: S | None = None
        traces = Joined()
        for block_summary, trace in summaries:
            summary = block_summary if summary is None else summary.merge(block_summary)
            if keep_traces:
                traces.append(trace)
        if summary is None:
            raise ModelError(f"{type(self).__name__}: no instance in any of the blocks")
        return summary, traces.tensor

    def _summarise(self, x: Tensor, mask: Tensor | None) -> tuple[S, Tensor]:
        return self.summarise_product(self.product(self.prepared(x, mask)), mask)

    def prepared(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return x (B, n, D) as the first layer takes it, standardised if a feature scale is set."""
        if mask is not None:
            # Weight 0 alone is not enough: 0 x NaN is NaN, in the sum and in the gradients of the first layer.
            x = x.masked_fill(mask.unsqueeze(-1), 0)
        return self.cast(x)

    def product(self, x: Tensor) -> Tensor:
        """Apply the first layer: y (B, n, d)."""
        return self.instance_layers()[0](x)

    def summarise_product(self, y: Tensor, mask: Tensor | None) -> tuple[S, Tensor]:
        """Apply all layers after the first to one block; return its summary and trace."""
        return self.reduce(self.instance_layers()[1:](y), mask)


class AttentionModel(MergeableModel[AttentionSummary]):
    """A mergeable model whose summary is an attention-weighted sum. A subclass defines `instance_layers`, `score` and
    `classify`.
    """

    summary_type = AttentionSummary

    def score(self, h: Tensor) -> Tensor:
        """Return scores (B, R, N) of embeddings h (B, N, d): the attention before its softmax."""
        raise NotImplementedError

    def reduce(self, h: Tensor, mask: Tensor | None) -> tuple[AttentionSummary, Tensor]:
        return attend(self.score(h), h, mask)

    def attention(self, summary: AttentionSummary, trace: Tensor) -> Tensor:
        return summary.weights(trace)

    def pooled(self, summary: AttentionSummary) -> Tensor:
        return summary.pooled()

    def classify_pooled(self, pooled: Tensor) -> Tensor:
        ones = pooled.new_ones(pooled.shape[:2])
        return self.classify(AttentionSummary(torch.zeros_like(ones), ones, ones, pooled))

    @torch.no_grad()
    def contributions(
        self, blocks: Iterable[Tensor], summary: AttentionSummary, trace: Tensor, slopes: Tensor, reference: Tensor
    ) -> Tensor:
        weights = summary.weights(trace)[0]  # (R, N)
        answers, rows, _ = slopes.shape
        at_reference = (slopes * reference).sum(dim=-1)  # (A, R)
        contributions = slopes.new_empty(answers, weights.shape[1])
        start = 0
        with evaluating(self):
            for h in self._embedded(blocks):
                end = start + len(h)
                along = (h.to(slopes.dtype) @ slopes.flatten(0, 1).T).unflatten(1, (answers, rows)) - at_reference
                contributions[:, start:end] = (along * weights[:, start:end].T.unsqueeze(1)).sum(dim=-1).T
                start = end
        return contributions
