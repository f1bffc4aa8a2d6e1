"""Pooling without learned attention: the mean or the maximum of the embedded instances.

h_i = Dropout(ReLU(LN(W x_i + b)))                            (N, d)
z   = mean_i h_i, or max_i h_i in each dimension              (d)
y   = Linear(Dropout(GELU(Linear(z))))                        (C)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from MILS.layers import embedding, mlp_head
from MILS.mergeable import AttentionModel, MergeableModel
from MILS.registry import register_mil
from MILS.summaries import AttentionSummary, MaxSummary


@register_mil
class meanPool(AttentionModel):
    """Mean pooling: attention whose scores are all equal.

    Arguments
        input_dim: length D of an instance's features.
        num_classes: number C of classes.
        hidden_dim: width d of the embedding.
        dropout: in the embedding and in the classifier.

    aux["attn"] (B, 1, N): uniform over the real instances.
    """

    def __init__(self, input_dim: int, num_classes: int, *, hidden_dim: int = 256, dropout: float = 0.25) -> None:
        super().__init__(input_dim, num_classes, hidden_dim=hidden_dim, dropout=dropout)
        self.require(hidden_dim >= 2, f"hidden_dim must be at least 2, got {hidden_dim}")
        self.instance_embed = embedding(input_dim, hidden_dim, dropout)
        self.classifier = mlp_head(hidden_dim, num_classes, dropout)

    def instance_layers(self) -> nn.Sequential:
        return self.instance_embed

    def score(self, h: Tensor) -> Tensor:
        return h.new_zeros(h.shape[0], 1, h.shape[1])

    def classify(self, summary: AttentionSummary) -> Tensor:
        return self.classifier(summary.pooled().squeeze(1).to(self.dtype))


@register_mil
class maxPool(MergeableModel[MaxSummary]):
    """Max pooling, in each dimension of the embedding.

    Arguments
        input_dim: length D of an instance's features.
        num_classes: number C of classes.
        hidden_dim: width d of the embedding.
        dropout: in the embedding and in the classifier.

    aux["attn"] (B, 1, N) is a contribution rather than an attention: the share of embedding dimensions whose maximum
    the instance supplies, the first of equals. A dimension that is 0 in every instance has no supplier and does not
    count; if all are, the weights are uniform.
    """

    summary_type = MaxSummary

    def __init__(self, input_dim: int, num_classes: int, *, hidden_dim: int = 256, dropout: float = 0.25) -> None:
        super().__init__(input_dim, num_classes, hidden_dim=hidden_dim, dropout=dropout)
        self.require(hidden_dim >= 2, f"hidden_dim must be at least 2, got {hidden_dim}")
        self.instance_embed = embedding(input_dim, hidden_dim, dropout)
        self.classifier = mlp_head(hidden_dim, num_classes, dropout)

    def instance_layers(self) -> nn.Sequential:
        return self.instance_embed

    def reduce(self, h: Tensor, mask: Tensor | None) -> tuple[MaxSummary, Tensor]:
        """Return the summary, and as trace (B, 1, n) which instances are real."""
        real = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        if mask is not None:
            real = ~mask
            h = h.masked_fill(mask.unsqueeze(-1), -torch.inf)
        maximum, winner = h.max(dim=1)
        return MaxSummary(maximum, winner, torch.tensor(h.shape[1])), real.unsqueeze(1)

    def classify(self, summary: MaxSummary) -> Tensor:
        return self.classifier(summary.maximum)

    def pooled(self, summary: MaxSummary) -> Tensor:
        return summary.maximum.unsqueeze(1)

    def classify_pooled(self, pooled: Tensor) -> Tensor:
        return self.classifier(pooled.squeeze(1))

    def contributions(
        self,
        blocks: Iterable[Tensor],  # noqa: ARG002 - the summary knows which instances supply what
        summary: MaxSummary,
        trace: Tensor,
        slopes: Tensor,
        reference: Tensor,
    ) -> Tensor:
        along = slopes[:, 0] * (summary.maximum - reference)  # (A, d)
        return slopes.new_zeros(len(slopes), trace.shape[-1]).index_add_(1, summary.winner[0], along)

    def attention(self, summary: MaxSummary, trace: Tensor) -> Tensor:
        bags, _, instances = trace.shape
        alive = summary.maximum > 0
        uniform = trace.to(torch.promote_types(self.dtype, torch.float32))
        supplier = summary.winner + instances * torch.arange(bags, device=trace.device).unsqueeze(1)
        counts = uniform.new_zeros(bags * instances)
        counts = counts.index_add(0, supplier.flatten(), alive.flatten().to(counts.dtype)).view(bags, 1, instances)
        counts = torch.where(alive.any(dim=1)[:, None, None], counts, uniform)
        return counts / counts.sum(dim=-1, keepdim=True)
