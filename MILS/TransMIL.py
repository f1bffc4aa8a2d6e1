"""TransMIL: a transformer over the bag, its self-attention approximated by landmarks.

Shao et al. 2021, https://arxiv.org/abs/2106.00908; the attention is Nystromformer's, Xiong et al. 2021,
https://arxiv.org/abs/2102.03902:

    h  = ReLU(W x + b), the leading instances repeated until their number is a square, a class token before them
    h  = h + Nystrom(LN(h)),  h = PyramidEncoding(h),  h = h + Nystrom(LN(h))
    y  = Linear(LN(class token))

    Nystrom:  softmax(q k~^T) pinv(softmax(q~ k~^T)) softmax(q~ k^T) v  +  33-tap convolution of v along the sequence

with q~, k~ the landmarks: means of q and k over consecutive segments. No (N, N) matrix is ever computed; time and
memory grow with N. Positions matter: unlike in the other models, the result depends on the order of the instances.

Segments are counted from the end and the first one may be short, which equals the usual zeros in front if nothing
attends to them. A batch without a mask runs as one; with a mask, bag by bag without its padding, since landmarks and
square depend on each bag's length.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from MILS.bag_model import Aux, BagModel
from MILS.layers import Dropout, Linear, at_least_single, full_precision, linear
from MILS.registry import register_mil

PINV_ITERATIONS = 6
RESIDUAL_TAPS = 33
ATTENTION_CHUNK = 32  # landmarks at a time in the computation of a row of attention


class Landmarks(NamedTuple):
    """The factors of Nystrom attention, in at least single precision; n tokens, r of which are queries, g landmarks.

    query (B, H, r, e), key (B, H, n, e), landmark_query and landmark_key (B, H, g, e), inverse (B, H, g, g).
    """

    query: Tensor
    key: Tensor
    landmark_query: Tensor
    landmark_key: Tensor
    inverse: Tensor

    def apply(self, value: Tensor) -> Tensor:
        """Multiply the attention by value (B, H, n, e), from the right, so that no factor is larger than its result."""
        read = functional.scaled_dot_product_attention(self.landmark_query, self.key, value)
        return functional.scaled_dot_product_attention(self.query, self.landmark_key, self.inverse @ read)

    @torch.no_grad()
    def first_row(self) -> Tensor:
        """Return the attention (B, H, n) of the first token; the approximation can be negative."""
        with full_precision(self.key):
            share = similarity(self.query[:, :, :1], self.landmark_key) @ self.inverse  # (B, H, 1, g)
            row = self.key.new_zeros(*self.key.shape[:2], 1, self.key.shape[2])
            shares, landmarks = share.split(ATTENTION_CHUNK, dim=-1), self.landmark_query.split(ATTENTION_CHUNK, dim=2)
            for share_chunk, landmark_query in zip(shares, landmarks, strict=True):
                row += share_chunk @ similarity(landmark_query, self.key)
        return row.squeeze(2)


class NystromAttention(nn.Module):
    """Multi-head self-attention by landmarks: (B, n, d) -> (B, r, d) for the first r tokens, all by default.

    Parameters have the names of the `nystrom-attention` package.
    """

    def __init__(self, dim: int, num_heads: int, num_landmarks: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_landmarks = num_landmarks
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim), Dropout(dropout))
        self.res_conv = nn.Conv2d(
            num_heads, num_heads, (RESIDUAL_TAPS, 1), padding=(RESIDUAL_TAPS // 2, 0), groups=num_heads, bias=False
        )

    def forward(self, x: Tensor, rows: int | None = None) -> tuple[Tensor, Landmarks]:
        rows = x.shape[1] if rows is None else rows
        w_q, w_k, w_v = self.to_qkv.weight.chunk(3)
        means = segment_means(x, self.num_landmarks)
        # The projections have no bias, so the mean of projections is the projection of the mean.
        query, key, landmark_query, landmark_key = (
            self._heads(*pair) for pair in ((x[:, :rows], w_q), (x, w_k), (means, w_q), (means, w_k))
        )
        value = self._heads(x, w_v)
        with full_precision(x):
            query, key, landmark_query, landmark_key = map(at_least_single, (query, key, landmark_query, landmark_key))
            inverse = iterative_pinv(similarity(landmark_query, landmark_key))
            landmarks = Landmarks(query, key, landmark_query, landmark_key, inverse)
            attended = landmarks.apply(at_least_single(value)).to(value.dtype)
        # The first rows of the convolution depend only on the values within its reach.
        attended = attended + self.res_conv(value[:, :, : rows + RESIDUAL_TAPS // 2])[:, :, :rows]
        return self.to_out(attended.transpose(1, 2).flatten(2)), landmarks

    def _heads(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, n, e)


class PyramidEncoding(nn.Module):
    """Position encoding: tokens on a square, plus their depthwise 7x7, 5x5 and 3x3 convolutions, (B, s * s, d).

    The three convolutions are linear in the same square, so they are computed as a single 7x7 one.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.seven, self.five, self.three = (nn.Conv2d(dim, dim, k, groups=dim) for k in (7, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        square = x.transpose(1, 2).unflatten(2, (side, side))
        weight, bias = self.kernel()
        return x + functional.conv2d(square, weight, bias, padding=3, groups=x.shape[2]).flatten(2).transpose(1, 2)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Return weight (d, 1, 7, 7) and bias (d) of the sum."""
        five = functional.pad(self.five.weight, (1, 1, 1, 1))
        three = functional.pad(self.three.weight, (2, 2, 2, 2))
        bias = torch.stack([self.get_parameter(f"{name}.bias") for name in ("seven", "five", "three")])
        return self.seven.weight + five + three, bias.sum(dim=0)


@register_mil
class TransMIL(BagModel):
    """Two layers of Nystrom self-attention with a position encoding between them.

    Arguments
        input_dim: length D of an instance's features.
        num_classes: number C of classes.
        hidden_dim: width d, divisible by num_heads; there are hidden_dim // 2 landmarks.
        num_heads: attention heads H.
        dropout: on what each attention layer adds.

    aux["attn"] (B, H, N): attention of the class token in the last layer, without the class token itself, repeated
    instances added to their originals, negative values (the approximation has some) set to 0, scaled to sum 1.
    aux["attn_raw"] (B, H, N): the same row before the last two steps. Neither carries a gradient.
    """

    def __init__(
        self, input_dim: int, num_classes: int, *, hidden_dim: int = 512, num_heads: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__(input_dim, num_classes, hidden_dim=hidden_dim, num_heads=num_heads, dropout=dropout)
        self.require(hidden_dim >= 2, f"hidden_dim must be at least 2, got {hidden_dim}")
        self.require(hidden_dim % num_heads == 0, f"hidden_dim {hidden_dim} is not divisible by num_heads {num_heads}")
        self.instance_embed = nn.Sequential(Linear(input_dim, hidden_dim), nn.ReLU(inplace=True))
        self.class_token = nn.Parameter(torch.randn(1, 1, hidden_dim))
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.attention1 = NystromAttention(hidden_dim, num_heads, hidden_dim // 2, dropout)
        self.position = PyramidEncoding(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.attention2 = NystromAttention(hidden_dim, num_heads, hidden_dim // 2, dropout)
        self.norm = nn.LayerNorm(hidden_dim)
        self.classifier = nn.Linear(hidden_dim, num_classes)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Aux]:
        self.check_bags(x, mask)
        if mask is None:
            logits, raw = self._forward_full(self.cast(x))
            return logits, {"attn": normalised(raw), "attn_raw": raw}
        bags = [self._forward_full(self.cast(bag[real]).unsqueeze(0)) for bag, real in zip(x, ~mask, strict=True)]
        raw = bags[0][1].new_zeros(x.shape[0], bags[0][1].shape[1], x.shape[1])
        attn = torch.zeros_like(raw)
        for i, (_, row) in enumerate(bags):
            raw[i, :, ~mask[i]] = row[0]
            attn[i, :, ~mask[i]] = normalised(row)[0]
        return torch.cat([logits for logits, _ in bags]), {"attn": attn, "attn_raw": raw}

    def _forward_full(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, C) and raw attention (B, H, N) of bags x (B, N, D) without padding."""
        instances = x.shape[1]
        side = math.isqrt(instances - 1) + 1
        h = self.instance_embed(x)
        token = self.class_token.to(h.dtype).expand(h.shape[0], -1, -1)
        h = torch.cat([token, h, h[:, : side * side - instances]], dim=1)
        h = h + self.attention1(self.norm1(h))[0]
        h = torch.cat([h[:, :1], self.position(h[:, 1:])], dim=1)
        # Only the class token is classified, so the last layer is computed for it alone.
        read, landmarks = self.attention2(self.norm2(h), rows=1)
        logits = self.classifier(self.norm(h[:, 0] + read[:, 0]))
        return logits, fold_repeats(landmarks.first_row()[..., 1:], instances)


def similarity(query: Tensor, key: Tensor) -> Tensor:
    """Return the softmax over keys of the scaled products: (B, H, r, e), (B, H, n, e) -> (B, H, r, n)."""
    return torch.softmax(query @ key.mT / math.sqrt(key.shape[-1]), dim=-1)


def segment_means(x: Tensor, segments: int) -> Tensor:
    """Return means (B, g, d) of x (B, n, d) over g <= `segments` runs of equal length; the first may be shorter."""
    n = x.shape[1]
    length = math.ceil(n / segments)
    count = math.ceil(n / length)
    first = n - (count - 1) * length
    later_runs = x[:, first:].unflatten(1, (count - 1, length))
    return torch.cat([x[:, :first].mean(dim=1, keepdim=True), later_runs.mean(dim=2)], dim=1)


def iterative_pinv(a: Tensor, iterations: int = PINV_ITERATIONS) -> Tensor:
    """Approximate the Moore-Penrose inverses of a (B, H, g, g) by the third-order iteration of Razavi et al. 2014.

    The first guess, the transpose over the norms, has one scale per bag: with one for the whole batch, a bag's result
    would depend on the other bags.
    """
    size = a.abs()
    scale = size.sum(dim=-1).amax(dim=(1, 2)) * size.sum(dim=-2).amax(dim=(1, 2))
    z = a.mT / scale[:, None, None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def fold_repeats(row: Tensor, instances: int) -> Tensor:
    """Add the weights of repeated instances to their originals: (B, H, s * s) -> (B, H, instances)."""
    folded = row[..., :instances].clone()
    folded[..., : row.shape[-1] - instances] += row[..., instances:]
    return folded


def normalised(raw: Tensor) -> Tensor:
    """Return the positive part of raw (B, H, N), scaled to sum 1 over N; uniform if nothing is positive."""
    positive = raw.clamp(min=0)
    total = positive.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, positive / total, 1 / raw.shape[-1])
