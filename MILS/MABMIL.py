"""Attention-based MIL, with one head (ABMIL) or several (MAD-MIL).

ABMIL, Ilse, Tomczak and Welling 2018, https://arxiv.org/abs/1802.04712:

    h_i = Dropout(ReLU(W x_i + b))                                (N, d)
    s_i = w . (tanh(V h_i) * sigmoid(U h_i))                      the gated score
    y   = Linear(sum_i softmax(s)_i h_i)                          (C)

MAD-MIL, Keshvarikhojasteh, Pluim and Veta 2024, https://arxiv.org/abs/2404.05362: h_i is cut into H slices, each slice
has its own score and sum, and the sums are concatenated before the linear classifier.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from MILS.layers import Dropout, Linear, linear_by_head
from MILS.mergeable import AttentionModel
from MILS.registry import register_mil
from MILS.summaries import AttentionSummary


class GatedAttention(nn.Module):
    """Scores of H heads, each for its own slice of w features: (B, N, H * w) -> (B, H, N).

    All heads, and the two branches of the gate, are computed at once. Initialised as nn.Linear would be.
    """

    def __init__(self, num_heads: int, width: int, attention_dim: int, *, gated: bool, dropout: float) -> None:
        super().__init__()
        branches = 2 if gated else 1
        self.weight = nn.Parameter(torch.empty(num_heads, width, branches * attention_dim))
        self.bias = nn.Parameter(torch.empty(num_heads, 1, branches * attention_dim))
        self.score_weight = nn.Parameter(torch.empty(num_heads, attention_dim, 1))
        self.score_bias = nn.Parameter(torch.empty(num_heads, 1, 1))
        for parameter, fan_in in (
            (self.weight, width),
            (self.bias, width),
            (self.score_weight, attention_dim),
            (self.score_bias, attention_dim),
        ):
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        self.gated = gated
        self.dropout = Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        bags, instances, _ = h.shape
        heads, width, _ = self.weight.shape
        slices = h.reshape(bags * instances, heads, width).transpose(0, 1)  # (H, B * N, w)
        hidden = linear_by_head(slices, self.weight, self.bias)
        if self.gated:
            content, gate = hidden.chunk(2, dim=-1)
            hidden = self.dropout(torch.tanh(content)) * self.dropout(torch.sigmoid(gate))
        else:
            hidden = self.dropout(torch.tanh(hidden))
        scores = torch.baddbmm(self.score_bias, hidden, self.score_weight)  # (H, B * N, 1)
        return scores.view(heads, bags, instances).transpose(0, 1)


class SlicedAttentionModel(AttentionModel):
    """The common base: embedding of H slices, gated attention on each, one linear classifier on all."""

    def build(self, num_heads: int, width: int, attention_dim: int, *, gated: bool, dropout: float) -> None:
        self.num_heads = num_heads
        self.instance_embed = nn.Sequential(Linear(self.input_dim, num_heads * width), nn.ReLU(), Dropout(dropout))
        self.gate = GatedAttention(num_heads, width, attention_dim, gated=gated, dropout=dropout)
        self.classifier = nn.Linear(num_heads * width, self.num_classes)

    def instance_layers(self) -> nn.Sequential:
        return self.instance_embed

    def score(self, h: Tensor) -> Tensor:
        return self.gate(h)

    def classify(self, summary: AttentionSummary) -> Tensor:
        # The weights of each head have summed all slices, in one product instead of a copy of h by slices. Of
        # (B, H, H, w), head by slice, only the diagonal belongs to the head itself.
        own = summary.pooled().unflatten(2, (self.num_heads, -1)).diagonal(dim1=1, dim2=2)  # (B, w, H)
        return self.classifier(own.transpose(1, 2).flatten(1).to(self.dtype))


@register_mil
class ABMIL(SlicedAttentionModel):
    """Gated attention pooling.

    Arguments
        input_dim: length D of an instance's features.
        num_classes: number C of classes.
        hidden_dim: width d of the embedding.
        attention_dim: width of the attention's hidden layer.
        gated: multiply the tanh branch by a sigmoid one.
        dropout: in the embedding and in the attention's hidden layer.

    aux["attn"] (B, 1, N): the attention weights.
    """

    def __init__(
        self,
        input_dim: int,
        num_classes: int,
        *,
        hidden_dim: int = 512,
        attention_dim: int = 256,
        gated: bool = True,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(
            input_dim, num_classes, hidden_dim=hidden_dim, attention_dim=attention_dim, gated=gated, dropout=dropout
        )
        self.build(1, hidden_dim, attention_dim, gated=gated, dropout=dropout)


@register_mil
class ABMIL_Multihead(SlicedAttentionModel):
    """MAD-MIL: gated attention pooling by several heads, each on its own slice of the embedding.

    Arguments
        input_dim: length D of an instance's features.
        num_classes: number C of classes.
        hidden_dim: width of the embedding; the heads share it, rounded up to ceil(hidden_dim / num_heads) each.
        num_heads: attention heads H; a head's hidden layer is half as wide as its slice.
        gated: multiply the tanh branch by a sigmoid one.
        dropout: in the embedding and in the attention's hidden layer.

    aux["attn"] (B, H, N): the attention weights of each head.
    """

    def __init__(
        self,
        input_dim: int,
        num_classes: int,
        *,
        hidden_dim: int = 512,
        num_heads: int = 2,
        gated: bool = True,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(
            input_dim, num_classes, hidden_dim=hidden_dim, num_heads=num_heads, gated=gated, dropout=dropout
        )
        width = math.ceil(hidden_dim / num_heads)
        self.require(width >= 2, f"num_heads {num_heads} leaves less than 2 of hidden_dim {hidden_dim} to each head")
        self.build(num_heads, width, width // 2, gated=gated, dropout=dropout)
