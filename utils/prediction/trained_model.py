"""A checkpoint with its model on the device, and what it asks of flags, of slides and of other checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from MILS import ModelError, mil_name
from MILS.bag_model import BagModel
from utils.core.cohorts import tcga_case
from utils.core.differences import first_differences
from utils.core.errors import CheckpointError, ConfigError, FeatureFileError, RecipeError
from utils.core.recipe import Recipe, mpp_difference
from utils.prediction.checkpoint import Checkpoint, id_digests
from utils.prediction.feeding import SlideFeed


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint, where it came from, and its model on the device."""

    path: Path
    checkpoint: Checkpoint
    model: BagModel

    @property
    def recipe(self) -> Recipe:
        """How the training features were made; a checkpoint that records no recipe has an empty one."""
        return self.checkpoint.recipe or Recipe()

    def require(self, **expected: Any) -> None:
        """Raise CheckpointError unless the checkpoint holds what is expected: `mil`, `model_class`, `class_names`,
        `dataset`, `input_dim`, `num_heads`; None expects nothing.
        """
        checkpoint, model = self.checkpoint, self.checkpoint.model
        held = {
            "mil": model["name"], "model_class": model["name"], "class_names": checkpoint.class_names,
            "dataset": checkpoint.dataset, "input_dim": model["input_dim"], "num_heads": model.get("num_heads"),
        }  # fmt: skip
        for name, value in expected.items():
            value = known_name(value) if name == "mil" and value else value
            if value is not None and value != held[name]:
                records = f"was trained with {name} {held[name]!r}, not" if held[name] is not None else ""
                raise CheckpointError(
                    f"{self.path}: {records or f'records no {name}, so not'} {value!r}; leave that setting out"
                )

    def require_recipe(self, recipe: Recipe) -> None:
        """Raise RecipeError where a recipe contradicts that of the training features."""
        contradictions = self.recipe.contradictions(recipe)
        if contradictions:
            raise RecipeError(
                f"{self.path}: was trained on features made in another way ({first_differences(contradictions)}); "
                "leave those settings out, the checkpoint knows the recipe"
            )

    def feed(self, mode: str | None, chunk_size: int | None) -> SlideFeed:
        """Return how slides are fed: as given, else as in the model's evaluation."""
        own = self.checkpoint.slide_feed
        if mode is None or mode == own.mode:
            return own if own.mode == "full" else replace(own, chunk_size=chunk_size or own.chunk_size)
        return SlideFeed.of_mode(mode, chunk_size or 1000)

    def check_width(self, width: int, recipe: Recipe, path: Path) -> None:
        """Raise FeatureFileError unless the model takes features `width` wide, made by `recipe`, of the file `path`."""
        expected = self.checkpoint.model["input_dim"]
        if width != expected:
            raise FeatureFileError(
                f"{path}: features are {width} wide ({recipe.backbone or 'of a backbone that is not recorded'}), the "
                f"model of {self.path} takes {expected} ({self.recipe.backbone or 'not recorded'}); extract the slide "
                "with the backbone that the model was trained on"
            )

    def differences(self, recipe: Recipe, mpp: float | None) -> str:
        """Return in what features of a recipe, `mpp` um/px, differ from the training's; empty where in nothing."""
        unlike = self.recipe.differences(recipe)
        return first_differences([*unlike, *mpp_difference(self.checkpoint.mpp_range, mpp)])

    def unknown_fields(self, recipe: Recipe, mpp: float | None) -> list[str]:
        """Return what cannot be compared with the training features, because one side does not record it."""
        unknown = self.recipe.unknown_fields(recipe)
        is_known = mpp is not None and self.checkpoint.mpp_range is not None
        return unknown if is_known else [*unknown, "mpp"]

    def provenance(self) -> dict[str, Any]:
        """Return which model this is, as a prediction's record has it."""
        return {
            "model": self.checkpoint.model,
            "checkpoint": str(self.path),
            "selection": self.checkpoint.selection,
            "temperature": self.checkpoint.temperature,
        }


def check_alike(models: Sequence[TrainedModel]) -> None:
    """Raise CheckpointError unless the checkpoints' answers can be averaged, RecipeError unless their features are of
    one kind.
    """
    first = models[0]
    for other in models[1:]:
        pairs = {
            "classes": (first.checkpoint.class_names, other.checkpoint.class_names),
            "feature width": (first.checkpoint.model["input_dim"], other.checkpoint.model["input_dim"]),
        }
        for what, (expected, value) in pairs.items():
            if value != expected:
                raise CheckpointError(
                    f"{other.path}: its {what} are {value}, those of {first.path} are {expected}; "
                    "give checkpoints that were trained for the same"
                )
        unlike = first.recipe.differences(other.recipe)
        if unlike:
            raise RecipeError(
                f"{other.path}: was trained on features made in another way than those of {first.path} "
                f"({first_differences(unlike)}); give checkpoints of one recipe"
            )


def common_feed(models: Sequence[TrainedModel], mode: str | None, chunk_size: int | None) -> SlideFeed:
    """Return how slides are fed to all models. Raise ConfigError where they were evaluated in different ways."""
    first, *others = models
    feed = first.feed(mode, chunk_size)
    for model in others:
        if (other := model.feed(mode, chunk_size)) != feed:
            raise ConfigError(
                f"{first.path} and {model.path} were evaluated on slides fed differently "
                f"({_fed(feed)}; {_fed(other)}); give --mode"
            )
    return feed


def _fed(feed: SlideFeed) -> str:
    return "whole" if feed.mode == "full" else f"in chunks of {feed.chunk_size}"


def seen_as(models: Sequence[TrainedModel], slide: str, case_id: str | None = None) -> str | None:
    """Return whether a model was trained on the "slide" or on its "case", which is the one given or that of a TCGA
    barcode; "" for neither, None where a checkpoint does not say.
    """
    records = [model.checkpoint.seen for model in models]
    for kind, name in (("slide", slide), ("case", case_id), ("case", tcga_case(slide))):
        if name is not None and any(id_digests(kind, [name])[0] in seen[kind] for seen in records):
            return kind
    return "" if all(seen["slide"] for seen in records) else None


def known_name(mil: str) -> str:
    """Return the model's own name for `--mil`, which may be an alias. Raise ConfigError for an unknown one."""
    try:
        return mil_name(mil)
    except ModelError as error:
        raise ConfigError(f"--mil {mil}: {error}") from error
