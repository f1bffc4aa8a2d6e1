"""LiteMIL written plainly from its equations, and checkpoints of it as the first version wrote them.

Import with `from tests.reference_litemil import ...`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ACCURACY = np.float64(0.9375)
KIDNEY = ("PRCC", "CCRCC", "CHRCC")


class _Stream(nn.Module):
    def __init__(self, input_dim: int, hidden_dim: int, num_heads: int, num_queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_queries, hidden_dim))
        self.project = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.ReLU())
        self.attn = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)


class ReferenceLiteMIL(nn.Module):
    """One bag (N, D) to its logits (C,) and the patches' attention (N,), the mean over heads and queries.

    All weights are random, biases and LayerNorm's too, so that leaving any of them out shows.
    """

    def __init__(self, input_dim: int, hidden_dim: int, num_classes: int, num_heads: int, num_queries: int) -> None:
        super().__init__()
        self.stream = _Stream(input_dim, hidden_dim, num_heads, num_queries)
        half = hidden_dim // 2
        self.classifier = nn.Sequential(
            nn.Linear(hidden_dim, half), nn.GELU(), nn.Identity(), nn.Linear(half, num_classes)
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stream.project(x)
        read, weights = self.stream.attn(self.stream.query, h, h)
        return self.classifier(read.mean(dim=0)), weights.mean(dim=0)


def write_fold(path: Path, model: nn.Module) -> Path:
    """`fold_<k>_best.pth`: the state dict and nothing else."""
    torch.save(OrderedDict(model.state_dict()), path)
    return path


def write_all_folds(path: Path, model: nn.Module, class_names: Sequence[str], accuracy: Any = ACCURACY) -> Path:
    """`all_folds_best.pth`: the state dict, the accuracy it was chosen by, the names of the classes."""
    config = {"class_names": list(class_names), "num_classes": len(class_names)}
    content = {"model_state_dict": model.state_dict(), "slide_accuracy": accuracy, "model_config": config}
    torch.save(content, path)
    return path
