"""Plain forms the models are measured against: the same functions, written the usual way."""

import math

import torch
from nystrom_attention import NystromAttention
from torch import Tensor, nn

from MILS.LiteMIL import LiteMIL


class PlainLiteMIL(nn.Module):
    """LiteMIL by torch's own attention and dropout: N keys, N values."""

    def __init__(self, input_dim: int, num_classes: int) -> None:
        super().__init__()
        model = LiteMIL(input_dim, num_classes)
        self.project, self.query, self.attn = model.stream.project, model.stream.query, model.stream.attn
        self.classifier = model.classifier
        self.project[3] = nn.Dropout(0.25)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.project(x)
        read, _ = self.attn(self.query.expand(len(x), -1, -1), h, h, key_padding_mask=mask)
        return self.classifier(read.mean(dim=1))


class PublishedTransMIL(nn.Module):
    """TransMIL as its paper describes it, on the `nystrom-attention` package; a batch without mask."""

    def __init__(self, input_dim: int, num_classes: int, hidden_dim: int = 512) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU())
        self.class_token = nn.Parameter(torch.randn(1, 1, hidden_dim))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(3))
        self.layers = nn.ModuleList(
            NystromAttention(
                dim=hidden_dim, dim_head=hidden_dim // 8, heads=8, num_landmarks=hidden_dim // 2, dropout=0.1
            )
            for _ in range(2)
        )
        self.position = nn.ModuleList(
            nn.Conv2d(hidden_dim, hidden_dim, k, padding=k // 2, groups=hidden_dim) for k in (7, 5, 3)
        )
        self.classifier = nn.Linear(hidden_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        side = math.ceil(math.sqrt(h.shape[1]))
        h = torch.cat([self.class_token.expand(len(h), -1, -1), h, h[:, : side * side - h.shape[1]]], dim=1)
        h = h + self.layers[0](self.norms[0](h))
        square = h[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        square = square + sum(convolution(square) for convolution in self.position)
        h = torch.cat([h[:, :1], square.flatten(2).transpose(1, 2)], dim=1)
        h = h + self.layers[1](self.norms[1](h))
        return self.classifier(self.norms[2](h)[:, 0])
