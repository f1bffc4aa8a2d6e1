"""The contract of a bag model, and batches of bags of different lengths.

Shapes here and in the models: B bags, N instances, D input features, d embedding, C classes, H attention heads, R rows
of attention weights (R = H, or heads x queries).
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Aux = dict[str, Tensor | None]

# Small bags are padded to a common length up to this many rows in all; beyond that the copy costs more than the calls.
PADDED_ROWS = defaultdict(lambda: 2**15, cpu=768)
# The buffers of a model that standardises its features.
_SCALE = ("feature_mean", "feature_std")
# Buffers that are part of the weights if they are set.
_OPTIONAL = (*_SCALE, "pooled_reference")


class ModelError(ValueError):
    """A model, a hyperparameter or a bag that cannot be used; the message says what is expected."""


class Origin(NamedTuple):
    """Where a model of other people's code comes from: what makes a fresh one, in another process too; its name for
    messages; and its spec.
    """

    make: Callable[[], BagModel]
    code: str
    spec: dict[str, Any]


class BagModel(nn.Module):
    """Base of every model: `model(x, mask=None) -> (logits, aux)`.

    x (B, N, D), any float type; mask (B, N) bool, True = padding, or None; logits (B, C); aux["attn"] (B, H, N), which
    sums to 1 over the real instances of a bag and is 0 on its padding. The values and the amount of padding, and the
    other bags of the batch, change nothing.

    A subclass passes its hyperparameters to `super().__init__`, which checks and remembers them: `model.spec` rebuilds
    the model with `build_mil(**model.spec)`. Its forward passes x through `cast`, which also standardises features if a
    scale is set (`set_feature_scale`): the scale is saved with the weights, so users of the model need not know of it.
    So is `pooled_reference` (R, d), the pooled embedding that evidence begins at (`MILS.evidence`), if it is set; of a
    model whose evidence is by its gradients, the instance (1, D).
    """

    feature_mean: Tensor | None
    feature_std: Tensor | None
    pooled_reference: Tensor | None
    origin: Origin | None = None  # of a model that other people's code makes
    is_binary_only = False  # whether it gives a single logit for two outputs

    def __init__(self, input_dim: int, num_classes: int, **hyperparameters: Any) -> None:
        super().__init__()
        self.require(is_whole(input_dim) and input_dim >= 1, f"input_dim must be at least 1, got {input_dim!r}")
        self.require(is_whole(num_classes) and num_classes >= 1, f"num_classes must be at least 1, got {num_classes!r}")
        check_options(type(self), hyperparameters)
        self.input_dim = input_dim
        self.num_classes = num_classes
        self.hyperparameters = hyperparameters
        for name in _OPTIONAL:
            self.register_buffer(name, None)

    def set_feature_scale(self, mean: Tensor | None, std: Tensor | None) -> None:
        """Standardise features from now on, `(x - mean) / std`, each (D,); None for both stops that."""
        like = next(self.parameters())
        for name, values in zip(_SCALE, (mean, std), strict=True):
            setattr(self, name, None if values is None else values.to(like.device, like.dtype))

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest is passed on
        self, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        for name in _OPTIONAL:
            stored = state_dict.get(prefix + name)
            setattr(self, name, None if stored is None else torch.empty_like(stored))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def spec(self) -> dict[str, Any]:
        """The arguments of `build_mil` that rebuild this model without its weights, for JSON."""
        if self.origin is not None:
            return dict(self.origin.spec)
        return {
            "name": type(self).__name__,
            "input_dim": self.input_dim,
            "num_classes": self.num_classes,
            **self.hyperparameters,
        }

    @property
    def gives_evidence(self) -> bool:
        """Whether what each instance contributes to the answer is defined: by the model or by its gradients."""
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """What users should know of how the model's answers are taken."""
        return ()

    @property
    def title(self) -> str:
        """The name of the model in messages."""
        return type(self).__name__ if self.origin is None else self.origin.code

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Other people's code is loaded by its origin where the model is unpickled."""
        if self.origin is None:
            return super().__reduce_ex__(protocol)
        return _restored, (self.origin.make, self.state_dict(), self.training)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def require(self, condition: bool, message: str) -> None:
        """Raise a ModelError that begins with the model's name unless `condition` holds."""
        if not condition:
            raise ModelError(f"{self.title}: {message}")

    def check_bags(self, x: Tensor, mask: Tensor | None) -> None:
        """Raise ModelError unless `forward` accepts x and mask, and every bag has a real instance."""
        self.require(
            x.dim() == 3 and x.shape[2] == self.input_dim and x.is_floating_point(),
            f"x must be a float tensor (B, N, {self.input_dim}), got {x.dtype} {tuple(x.shape)}",
        )
        self.require(x.shape[0] > 0 and x.shape[1] > 0, f"no instance in x of shape {tuple(x.shape)}")
        if mask is None:
            return
        self.require(
            mask.dtype is torch.bool and mask.shape == x.shape[:2],
            f"mask must be a bool tensor {tuple(x.shape[:2])}, True = padding, got {mask.dtype} {tuple(mask.shape)}",
        )
        # Without an error the result is read only once, so the device is waited for only once.
        empty = mask.all(dim=1)
        if empty.any():
            bags = ", ".join(map(str, empty.nonzero().flatten().tolist()))
            raise ModelError(f"{self.title}: all {x.shape[1]} instances are padding in bag {bags} of the batch")

    def forward_bags(self, bags: Sequence[Tensor]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Predict a batch of bags of different lengths, each (n_i, D), at the cost of their instances alone.

        Returns logits (B, C) and aux with the entries of `forward`, a list of one (H, n_i) per bag. Equals predicting
        the bags one by one. Raises ModelError for a bag without instances or of another shape.
        """
        self.require(len(bags) > 0, "no bag in the batch")
        for bag in bags:
            self.check_bags(bag.unsqueeze(0), None)
        logits: dict[int, Tensor] = {}
        aux: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for group in groups_to_pad([len(bag) for bag in bags], PADDED_ROWS[bags[0].device.type]):
            group_logits, group_aux = self(*padded([bags[i] for i in group]))
            for row, i in enumerate(group):
                logits[i] = group_logits[row]
                for key, values in group_aux.items():
                    if values is not None:
                        aux[key][i] = values[row, :, : len(bags[i])]
        order = range(len(bags))
        return torch.stack([logits[i] for i in order]), {key: [values[i] for i in order] for key, values in aux.items()}

    def cast(self, x: Tensor) -> Tensor:
        """Return x, standardised if a scale is set, in the parameters' dtype, or in its own if autocast is on."""
        if self.feature_mean is not None and self.feature_std is not None:
            x = (x.to(torch.promote_types(x.dtype, self.feature_mean.dtype)) - self.feature_mean) / self.feature_std
        if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
            return x
        return x.to(self.dtype)


def _restored(make: Callable[[], BagModel], state: dict[str, Tensor], is_training: bool) -> BagModel:
    model = make()
    model.load_state_dict(state, assign=True)
    return model.train(is_training)


def class_options(cls: type[BagModel]) -> dict[str, Any]:
    """Return the hyperparameters of a model class and their defaults."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(cls: type[BagModel], values: dict[str, Any]) -> None:
    """Check hyperparameters by the type of their defaults: whole numbers are sizes, floats are probabilities."""
    missing = [key for key in class_options(cls) if key not in values]
    if missing:
        raise ModelError(f"{cls.__name__}: hand {', '.join(missing)} to super().__init__, which remembers them")
    for key, default in class_options(cls).items():
        value = values[key]
        if isinstance(default, bool):
            fits, expected = isinstance(value, bool), "true or false"
        elif isinstance(default, int):
            fits, expected = is_whole(value) and value >= 1, "a whole number of at least 1"
        else:
            fits, expected = isinstance(value, (int, float)) and 0 <= value < 1, "in [0, 1)"
        if not fits:
            raise ModelError(f"{cls.__name__}: {key} must be {expected}, got {value!r}")


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode within the context; afterwards each module has its former mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def groups_to_pad(lengths: Sequence[int], most_rows: int) -> Iterator[list[int]]:
    """Group the indices of bags by length, to pad each group to one length: at most `most_rows` rows, or one bag.

    Beyond 64 rows no bag is padded to more than one and a half times its length.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[group[0]] if group else 0
        if group and ((len(group) + 1) * longest > most_rows or longest > max(64, 1.5 * lengths[i])):
            yield group
            group = []
        group.append(i)
    yield group


def padded(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pad bags (n_i, D), the longest first, to x (B, n_0, D); return it and its mask, None if all have one length."""
    if len(bags) == 1:
        return bags[0].unsqueeze(0), None
    lengths = torch.tensor([len(bag) for bag in bags], device=bags[0].device)
    dtype = functools.reduce(torch.promote_types, (bag.dtype for bag in bags))
    x = nn.utils.rnn.pad_sequence([bag.to(dtype) for bag in bags], batch_first=True)
    if len(bags[-1]) == len(bags[0]):
        return x, None
    return x, torch.arange(len(bags[0]), device=x.device) >= lengths.unsqueeze(1)
