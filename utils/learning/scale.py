"""The scale of features: whether it is one that models are initialised for, and the standardisation of those it is not.

A first layer's weights are drawn for inputs whose root mean square is about 1. Far from it a model without a
normalisation of its own learns little or nothing, so that a comparison would credit architectures for the scale.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from MILS.bag_model import BagModel, evaluating
from utils.core.errors import ConfigError
from utils.core.runtime import log
from utils.learning.splits import OuterFold

# Root mean squares that count as usual: features of common encoders lie within.
USUAL = 0.1, 10.0
# Features are looked at in pieces of so many rows.
_ROWS = 4096
# Features of one length per patch (L2-normalised) are known by it, but for the rounding of half precision; of fewer
# features than these, the length is about 1 by chance too often.
_ROUNDING, _FEWEST_OF_LENGTH_1 = 5e-3, 8
# A feature that varies by less, relative to its mean, is constant but for rounding.
_CONSTANT = 1e-6


def why_unusual(rms: np.ndarray, dim: int) -> str | None:
    """Return why features are not of the scale that models are initialised for; None where they are. `rms (slides,)`
    are the slides' root mean squares, `dim` is the features' number.
    """
    median = float(np.median(rms))
    if dim >= _FEWEST_OF_LENGTH_1 and bool((np.abs(rms * dim**0.5 - 1) < _ROUNDING).all()):
        return f"each patch's features have length 1, as L2-normalised ones (root mean square {median:.3g})"
    if USUAL[0] <= median <= USUAL[1]:
        return None
    return (
        f"the features' root mean square is {median:.3g}, and models are initialised for {USUAL[0]:g} to {USUAL[1]:g}"
    )


@dataclass(frozen=True)
class Standardization:
    """Whether models standardise their features: what was `asked` (auto, on, off), the numbers of the outer `folds` in
    which they do, and the median `rms` of the slides' features (None where they were not looked at).
    """

    asked: str
    folds: tuple[int, ...] = ()
    rms: float | None = None

    @classmethod
    def decide(cls, asked: str, folds: Sequence[OuterFold], rms: np.ndarray, dim: int) -> Self:
        """Decide from the root mean squares `rms (slides,)` of `dim` features; for "auto", each outer fold by its
        training slides alone. What is decided, or would help, is said.
        """
        why = {fold.number: reason for fold in folds if (reason := why_unusual(rms[fold.train], dim))}
        unusual = list(why)
        chosen = {"auto": unusual, "off": [], "on": [fold.number for fold in folds]}[asked]
        median = float(np.median(rms))
        if unusual and asked != "on":
            found = why_unusual(rms, dim) or why[unusual[0]]
            where = "" if len(unusual) == len(folds) else f" in outer fold {', '.join(map(str, unusual))}"
            if asked == "auto":
                log.info("%s: each feature is standardised%s (--standardize off leaves them as they are)", found, where)
            else:
                log.warning("%s: they may learn little; give --standardize auto", found)
        return cls(asked, tuple(chosen), median)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folds": list(self.folds)}


def feature_scale(features: Callable[[int], Tensor], slides: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation `(D,)`, float32, of each feature over the patches of `slides`. Each slide
    weighs the same, as it does in the loss: a few large ones do not decide.

    The deviation of a feature that varies less than half of the others do is theirs, their median: one that hardly
    occurs in training would otherwise be blown up in slides where it does.
    """
    means, variances = zip(*(_moments(features(int(slide))) for slide in slides), strict=True)
    means, variances = torch.stack(means), torch.stack(variances)
    mean, std = means.mean(dim=0), (variances.mean(dim=0) + means.var(dim=0, correction=0)).sqrt()
    varying = std[std > _CONSTANT * mean.abs()]
    least = varying.median() if len(varying) else torch.ones_like(std[0])
    return mean.float(), torch.maximum(std, least).float()


def standardize(model: BagModel, mean: Tensor, std: Tensor) -> None:
    """Make `model` standardise features by `mean (D,)` and `std (D,)`. Raises ConfigError for a model that cannot."""
    if not isinstance(model, BagModel):
        raise ConfigError(f"{type(model).__name__}: cannot standardise features; give --standardize off")
    probe = torch.randn(1, 4, model.input_dim, generator=torch.Generator().manual_seed(0))
    answers = []
    for shift in (0.0, 1.0):
        model.set_feature_scale(torch.full_like(mean, shift), torch.ones_like(std))
        with torch.no_grad(), evaluating(model):
            answers.append(model(probe.to(next(model.parameters()).device))[0])
    if torch.equal(*answers):
        raise ConfigError(
            f"{type(model).__name__}: does not standardise features, for its forward takes x as it is; begin it with "
            "x = self.cast(x), or give --standardize off"
        )
    model.set_feature_scale(mean, std)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance `(D,)` in double precision of `features (N, D)`, taken about the first row so that a large
    offset costs no digits.
    """
    origin = features[0].double()
    sums, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for part in features.split(_ROWS):
        deviations = part.double() - origin
        sums += deviations.sum(dim=0)
        squares += deviations.square().sum(dim=0)
    mean = sums / len(features)
    return origin + mean, (squares / len(features) - mean.square()).clamp(min=0)
