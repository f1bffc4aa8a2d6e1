"""Other people's models, as files and as classes, for the tests of how they are taken.

Import with `from tests.mils.others import ...`.
"""

from pathlib import Path

import torch
from torch import nn

# A model as in its own repository: it knows nothing of bags of different lengths, of masks or of our contract.
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, in_dim, n_classes, hidden=4, dropout: float = 0, act="tanh"):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_dim, hidden), nn.Tanh(), nn.Dropout(dropout))
        self.score, self.head = nn.Linear(hidden, 1), nn.Linear(hidden, n_classes)

    def forward(self, x):
        h = self.embed(x)
        a = self.score(h).softmax(dim=1)
        return self.head((a * h).sum(dim=1)), a


class Broken(Net):
    def forward(self, x):
        if len(x[0]) < 60:
            raise ValueError("too few patches")
        return super().forward(x)


class Needy(Net):
    def __init__(self, in_dim, n_classes, depth):
        super().__init__(in_dim, n_classes)


def make(in_dim, n_classes, hidden=8):
    return Net(in_dim, n_classes, hidden)


number = 3
"""


def write_net(path: Path, text: str = NET) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class Plain(nn.Module):
    """Gives what `answer(logits, h, a)` makes of its logits (1, C), embeddings (1, N, D) and raw scores (1, N, H)."""

    heads = 2

    def __init__(self, input_dim, num_classes):
        super().__init__()
        self.score, self.head = nn.Linear(input_dim, self.heads), nn.Linear(input_dim, num_classes)

    def forward(self, x):
        scores = self.score(x)
        pooled = (scores.softmax(dim=1).mT @ x).mean(dim=1)
        return self.answer(self.head(pooled), x, scores)

    def answer(self, logits, h, a) -> object:
        return logits


def given(answer, heads: int = 2) -> type[Plain]:
    """A class whose forward gives `answer(logits, h, scores)`."""
    return type("Given", (Plain,), {"answer": staticmethod(answer), "heads": heads})


def scores_of(model, x) -> torch.Tensor:
    """The softmax over the patches of the raw scores of a `Plain` model, (H, N)."""
    return model.module.score(x).softmax(dim=1)[0].mT
