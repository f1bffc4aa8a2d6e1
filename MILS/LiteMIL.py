"""LiteMIL: learned queries pool a bag by multi-head attention (Kussaibi, https://github.com/hkussaibi/LiteMIL).

    h_i = Dropout(ReLU(LN(W x_i + b)))                            the embedding, (N, d)
    z   = mean over queries of MultiheadAttention(q, h, h)        the bag, (d)
    y   = Linear(Dropout(GELU(Linear(z))))                        the logits, (C)

The queries q (Q, d) do not depend on the bag, so the two large projections of attention collapse. Per head,

    score_i = q' . (W_k h_i + b_k) / sqrt(e) = h_i . (W_k^T q') / sqrt(e) + const,      q' = W_q q + b_q, e = d / H

where the constant cancels in the softmax: one vector per head and query replaces the N keys. And

    sum_i a_i (W_v h_i + b_v) = W_v (sum_i a_i h_i) + b_v sum_i a_i

so the values are projected once, after the sum. The last sum is 1 except under attention dropout. The parameters and
the function are those of `torch.nn.MultiheadAttention`, without the (N, d) tensors of keys, values and their gradients.
"""

from __future__ import annotations

import math

from torch import Tensor, empty, nn
from torch.nn import functional

from MILS.layers import Dropout, embedding, full_precision, mlp_head
from MILS.mergeable import AttentionModel
from MILS.registry import register_mil
from MILS.summaries import AttentionSummary, attend


class QueryStream(nn.Module):
    """Embedding and query attention: instances (B, N, D) to the bag's embedding (B, d).

    `attn` only holds the parameters, with the names and the initialisation of MultiheadAttention.
    """

    def __init__(self, input_dim: int, hidden_dim: int, num_heads: int, num_queries: int, dropout: float) -> None:
        super().__init__()
        self.project = embedding(input_dim, hidden_dim, dropout)
        self.query = nn.Parameter(nn.init.xavier_uniform_(empty(num_queries, hidden_dim)))
        self.attn = nn.MultiheadAttention(hidden_dim, num_heads, dropout=dropout, batch_first=True)
        self.attn_dropout = Dropout(dropout)

    def absorbed_query(self) -> Tensor:
        """Return the scaled queries times the key projection, (H * Q, d): a score is their product with h."""
        heads, d = self.attn.num_heads, self.attn.embed_dim
        w_q, w_k, _ = self.attn.in_proj_weight.chunk(3)
        b_q = self.attn.in_proj_bias[:d]
        q = functional.linear(self.query, w_q, b_q).unflatten(1, (heads, -1)).transpose(0, 1)  # (H, Q, d / H)
        return (q @ w_k.unflatten(0, (heads, -1))).flatten(0, 1) / math.sqrt(d // heads)

    def score(self, h: Tensor) -> Tensor:
        """Return scores (B, H * Q, N) of embeddings h (B, N, d)."""
        with full_precision(h):
            return functional.linear(h.to(self.query.dtype), self.absorbed_query()).transpose(1, 2)

    def read_out(self, summary: AttentionSummary) -> Tensor:
        """Return the bag's embedding (B, d). All steps after the sum are linear, so the queries are averaged first."""
        heads, d = self.attn.num_heads, self.attn.embed_dim
        w_v, b_v = self.attn.in_proj_weight[2 * d :], self.attn.in_proj_bias[2 * d :]
        pooled = summary.pooled().unflatten(1, (heads, -1)).mean(dim=2).to(w_v.dtype)  # (B, H, d)
        mass = summary.mass().unflatten(1, (heads, -1)).mean(dim=2).to(w_v.dtype)  # (B, H)
        # (H, B, d) @ (H, d, d / H): each head projects its own sum.
        values = (pooled.transpose(0, 1) @ w_v.unflatten(0, (heads, -1)).transpose(1, 2)).transpose(0, 1)
        values = values + mass.unsqueeze(-1) * b_v.unflatten(0, (heads, -1))
        return self.attn.out_proj(values.flatten(1))


@register_mil
class LiteMIL(AttentionModel):
    """Learned-query attention over embedded instances.

    Arguments
        input_dim: length D of an instance's features.
        num_classes: number C of classes.
        hidden_dim: width d of the embedding, divisible by num_heads.
        num_heads: attention heads H.
        num_queries: learned queries Q; the bag's embedding is the mean over them.
        dropout: in the embedding, on the attention weights and in the classifier.

    aux["attn"] (B, H, N): each head's weights, the mean over queries, before attention dropout.
    """

    def __init__(
        self,
        input_dim: int,
        num_classes: int,
        *,
        hidden_dim: int = 256,
        num_heads: int = 4,
        num_queries: int = 1,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(
            input_dim, num_classes, hidden_dim=hidden_dim, num_heads=num_heads, num_queries=num_queries, dropout=dropout
        )
        self.require(hidden_dim >= 2, f"hidden_dim must be at least 2, got {hidden_dim}")
        self.require(hidden_dim % num_heads == 0, f"hidden_dim {hidden_dim} is not divisible by num_heads {num_heads}")
        self.stream = QueryStream(input_dim, hidden_dim, num_heads, num_queries, dropout)
        self.classifier = mlp_head(hidden_dim, num_classes, dropout)

    def instance_layers(self) -> nn.Sequential:
        return self.stream.project

    def score(self, h: Tensor) -> Tensor:
        return self.stream.score(h)

    def reduce(self, h: Tensor, mask: Tensor | None) -> tuple[AttentionSummary, Tensor]:
        return attend(self.score(h), h, mask, self.stream.attn_dropout)

    def classify(self, summary: AttentionSummary) -> Tensor:
        return self.classifier(self.stream.read_out(summary))

    def attention(self, summary: AttentionSummary, trace: Tensor) -> Tensor:
        return summary.weights(trace).unflatten(1, (self.stream.attn.num_heads, -1)).mean(dim=2)
