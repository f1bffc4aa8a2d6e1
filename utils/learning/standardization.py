"""Standardise features whose scale is far from the one that models are initialised for.

The weights of a first layer are drawn for inputs with a root mean square of about 1. Far from it, a model without its
own normalisation learns little or nothing, so that a comparison of architectures would measure the scale.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from MILS.bag_model import BagModel, evaluating
from utils.core.errors import ConfigError
from utils.core.runtime import log
from utils.learning.splits import OuterFold

# The usual range of root mean squares, which holds those of common encoders.
USUAL = 0.1, 10.0
_ROWS = 4096  # read at a time
# L2-normalised features have length 1 in every patch, to the rounding of half precision. With fewer features than
# this, other features often have about that length by chance.
_ROUNDING, _FEWEST_OF_LENGTH_1 = 5e-3, 8
# A feature with a smaller deviation, relative to its mean, is constant to rounding.
_CONSTANT = 1e-6


def why_unusual(rms: np.ndarray, dim: int) -> str | None:
    """Return why features are not of the scale that models are initialised for, or None. `rms (slides,)` are the
    slides' root mean squares, `dim` is the number of features.
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
    """Whether models standardise their features: the `mode` (auto, on, off), the numbers of the outer `folds` in which
    they do, and the median `rms` of the slides' features (None if they were not read).
    """

    mode: str
    folds: tuple[int, ...] = ()
    rms: float | None = None

    @classmethod
    def decide(cls, mode: str, folds: Sequence[OuterFold], rms: np.ndarray, dim: int) -> Self:
        """Decide from the root mean squares `rms (slides,)` of `dim` features, and log the decision or the advice.

        "auto" decides for each outer fold by its training slides alone.
        """
        reasons = {fold.number: reason for fold in folds if (reason := why_unusual(rms[fold.train], dim))}
        unusual = list(reasons)
        chosen = {"auto": unusual, "off": [], "on": [fold.number for fold in folds]}[mode]
        if unusual and mode != "on":
            reason = why_unusual(rms, dim) or reasons[unusual[0]]
            where = "" if len(unusual) == len(folds) else f" in outer fold {', '.join(map(str, unusual))}"
            if mode == "auto":
                text = "%s: each feature is standardised%s (--standardize off leaves them as they are)"
                log.info(text, reason, where)
            else:
                log.warning("%s: they may learn little; give --standardize auto", reason)
        return cls(mode, tuple(chosen), float(np.median(rms)))

    def as_dict(self) -> dict[str, Any]:
        return {"asked": self.mode, "folds": list(self.folds), "rms": self.rms}


def feature_scale(features: Callable[[int], Tensor], slides: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation `(D,)`, float32, of each feature over the patches of `slides`. Each slide has
    the same weight, as in the loss.

    No deviation is below the features' median: a feature that hardly varies in training would otherwise be blown up in
    slides where it does.
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
    logits = []
    for shift in (0.0, 1.0):
        model.set_feature_scale(torch.full_like(mean, shift), torch.ones_like(std))
        with torch.no_grad(), evaluating(model):
            logits.append(model(probe.to(next(model.parameters()).device))[0])
    if torch.equal(*logits):
        raise ConfigError(
            f"{type(model).__name__}: does not standardise features, for its forward takes x as it is; begin it with "
            "x = self.cast(x), or give --standardize off"
        )
    model.set_feature_scale(mean, std)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance `(D,)` of `features (N, D)` in double precision, computed about the first row, so that
    a large offset costs no digits.
    """
    origin = features[0].double()
    sums, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for block in features.split(_ROWS):
        deviations = block.double() - origin
        sums += deviations.sum(dim=0)
        squares += deviations.square().sum(dim=0)
    mean = sums / len(features)
    return origin + mean, (squares / len(features) - mean.square()).clamp(min=0)
