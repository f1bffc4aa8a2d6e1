"""Several trained models that answer as one: the mean of their probabilities."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from MILS.bag_model import Aux, BagModel


class Ensemble(BagModel):
    """`members`, models of one kind that take and give the same: logits (B, C) are the logarithms of their mean
    probabilities, attention (B, H, N) is their mean, or None where theirs is.
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
        known = [attn for _, aux in answers if (attn := aux["attn"]) is not None]
        attn = torch.stack(known).mean(dim=0) if len(known) == len(answers) else None
        return torch.logsumexp(logarithms, dim=0) - math.log(len(answers)), {"attn": attn}
