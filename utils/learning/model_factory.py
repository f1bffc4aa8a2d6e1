"""Check that a function makes models that cross-validation can train, save and load again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from MILS import ModelError, build_mil
from MILS.bag_model import BagModel
from utils.core.errors import ConfigError, TrainingError
from utils.core.runtime import log

ModelFactory = Callable[[], BagModel]


@contextmanager
def as_training_errors() -> Iterator[None]:
    """Raise what a model cannot do with a bag, such as an error in other people's code, as a TrainingError."""
    try:
        yield
    except ModelError as error:
        raise TrainingError(str(error)) from error


def spec_of(model_factory: ModelFactory, *, has_two_classes: bool = True) -> dict[str, Any]:
    """Return the spec of the factory's models. `has_two_classes`: the task is to tell two classes apart, so that one
    logit may stand for both.

    Raises ConfigError for a factory whose models share weights (training would leak from fold to fold, into the test
    data) or cannot be rebuilt from a checkpoint.
    """
    if not callable(model_factory):
        raise ConfigError(f"model_factory {model_factory!r}: expected a function that makes a model (build_mil)")
    if isinstance(model_factory, torch.nn.Module):
        raise ConfigError(
            f"model_factory: expected a function that makes a model, found a {type(model_factory).__name__}; each "
            "training needs a fresh one: give functools.partial(build_mil, ...)"
        )
    try:
        first, second = model_factory(), model_factory()
    except ModelError as error:
        raise ConfigError(f"model_factory: {error}") from error
    shared = {parameter.data_ptr() for parameter in first.parameters()} & {p.data_ptr() for p in second.parameters()}
    if first is second or shared:
        raise ConfigError(
            "model_factory returns one shared model; make a new one at every call: lambda: build_mil(...)"
        )
    spec = getattr(first, "spec", None)
    if not isinstance(spec, dict):
        raise ConfigError(f"{type(first).__name__} has no spec to rebuild it by; make it with MILS.register_mil")
    _check_rebuilt(first, spec)
    if first.is_binary_only and not has_two_classes:
        raise ConfigError(f"{first.title} gives a single logit, but the outputs are two, and not two classes")
    for note in first.notes:
        log.info(note)
    return spec


def weight_count(factory: ModelFactory) -> int:
    """Return the number of weights of a factory's models."""
    return sum(weights.numel() for weights in factory().parameters())


def _check_rebuilt(model: torch.nn.Module, spec: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `build_mil` rebuilds the model from its spec, as it does for a checkpoint."""
    name = type(model).__name__
    try:
        rebuilt = build_mil(**spec)
    except (ModelError, TypeError) as error:
        raise ConfigError(
            f"model_factory: a checkpoint of {name} could not be loaded ({error}); decorate the class with "
            "MILS.register_mil, and hand every hyperparameter to super().__init__"
        ) from error
    if type(rebuilt) is not type(model):
        raise ConfigError(f"model_factory: {name} is the name of another model; rename the class, and register it")
    expected, shapes = ({key: value.shape for key, value in each.state_dict().items()} for each in (model, rebuilt))
    if shapes != expected:
        unlike = next(key for key in expected | shapes if expected.get(key) != shapes.get(key))
        raise ConfigError(
            f"model_factory: the spec of {name} makes another model (they differ in {unlike}); hand every "
            "hyperparameter to super().__init__"
        )
