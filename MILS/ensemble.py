"""Several trained models as one, whose prediction is the mean of their probabilities."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from MILS.bag_model import Aux, BagModel


class Ensemble(BagModel):
    """`members` are models of one kind, with the same inputs and outputs. Logits (B, C) are the logarithms of their
    mean probabilities; attention (B, H, N) is their mean, or None if any of theirs is.
    """

    def __init__(self, members: Sequence[BagModel]) -> None:
        super().__init__(members[0].input_dim, members[0].num_classes)
        self.members = nn.ModuleList(members)

    @property
    def models(self) -> list[BagModel]:
        return [member for member in self.members if isinstance(member, BagModel)]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Aux]:
        answers = [member(x, mask) for member in self.models]
        logarithms = torch.stack([torch.log_softmax(logits, dim=-1) for logits, _ in answers])
        attentions = [attn for _, aux in answers if (attn := aux["attn"]) is not None]
        attn = torch.stack(attentions).mean(dim=0) if len(attentions) == len(answers) else None
        return torch.logsumexp(logarithms, dim=0) - math.log(len(answers)), {"attn": attn}


def members_of(model: BagModel) -> list[BagModel]:
    """Return an ensemble's members, or the one model."""
    return model.models if isinstance(model, Ensemble) else [model]
