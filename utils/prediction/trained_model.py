"""A checkpoint with its model on the device, and its checks of flags, features and other checkpoints."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from MILS import ModelError, use_mil
from MILS.bag_model import BagModel
from MILS.ensemble import members_of
from utils.bags.settings import CHUNK_SIZE
from utils.bags.spelling import plain_spelling
from utils.core.cohorts import tcga_case
from utils.core.differences import first_differences
from utils.core.errors import CheckpointError, ConfigError, FeatureFileError, RecipeError, first_few
from utils.core.recipe import Recipe, mpp_difference
from utils.core.runtime import log
from utils.prediction.checkpoint import Checkpoint, id_digests
from utils.prediction.forward_pass import SlideFeed
from utils.tasks.task import FittedFigures

BY_NAME = (
    "compared with the training slides by name alone, as the checkpoint does not record their content: a renamed copy "
    "of one counts as unseen"
)


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint, its file, and its model on the device."""

    path: Path
    checkpoint: Checkpoint
    model: BagModel

    @property
    def recipe(self) -> Recipe:
        """Return the recipe of the training features, an empty one if the checkpoint records none."""
        return self.checkpoint.recipe or Recipe()

    def require(self, **expected: Any) -> None:
        """Raise CheckpointError unless the checkpoint holds the expected values of `mil`, `model_class`, `class_names`,
        `dataset`, `input_dim`, `num_heads`; None expects nothing.
        """
        checkpoint, model = self.checkpoint, self.checkpoint.model
        # Other people's code may lie in a file of another name since.
        name = members_of(self.model)[0].spec["name"]
        recorded = {
            "mil": name, "model_class": name, "class_names": checkpoint.class_names,
            "dataset": checkpoint.dataset, "input_dim": model["input_dim"], "num_heads": model.get("num_heads"),
        }  # fmt: skip
        for name, value in expected.items():
            value = model_name(value) if name == "mil" and value else value
            own = recorded[name]
            if value is not None and value != own:
                text = f"records no {name}, so not" if own is None else f"was trained with {name} {own!r}, not"
                raise CheckpointError(f"{self.path}: {text} {value!r}; leave that setting out")

    def fitted_to(self, feed: SlideFeed) -> FittedFigures | None:
        """Return what was fitted to inner validation if slides were fed so there, else None."""
        return self.checkpoint.fitted if self.checkpoint.slide_feed == feed else None

    def at_prevalence(self, prevalence: float) -> Self:
        """Return the model calibrated for slides of which this share is positive. Raises CheckpointError."""
        try:
            return replace(self, checkpoint=self.checkpoint.at_prevalence(prevalence))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: --prevalence {prevalence:g}: {error}; leave it out") from None

    def require_recipe(self, recipe: Recipe) -> None:
        """Raise RecipeError if a recipe contradicts that of the training features."""
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
        return SlideFeed.of_mode(mode, chunk_size or CHUNK_SIZE, unit=own.unit)

    def check_width(self, width: int, recipe: Recipe, path: Path) -> None:
        """Raise FeatureFileError unless the model takes features `width` wide, which the file `path` holds."""
        expected = self.checkpoint.model["input_dim"]
        if width != expected:
            raise FeatureFileError(
                f"{path}: features are {width} wide ({recipe.backbone or 'of a backbone that is not recorded'}), the "
                f"model of {self.path} takes {expected} ({self.recipe.backbone or 'not recorded'}); extract the slide "
                "with the backbone that the model was trained on"
            )

    def differences(self, recipe: Recipe, mpp: float | None) -> str:
        """Return how features of a recipe, at `mpp` um/px, differ from the training's; empty if they do not."""
        unlike = self.recipe.differences(recipe)
        return first_differences([*unlike, *mpp_difference(self.checkpoint.mpp_range, mpp)])

    def unknown_fields(self, recipe: Recipe, mpp: float | None) -> list[str]:
        """Return the fields that cannot be compared with the training features, as one side does not record them."""
        unknown = self.recipe.unknown_fields(recipe)
        has_mpp = mpp is not None and self.checkpoint.mpp_range is not None
        return unknown if has_mpp else [*unknown, "mpp"]

    def provenance(self) -> dict[str, Any]:
        """Return the model's entries in a prediction's record."""
        return {
            "model": self.checkpoint.model,
            "checkpoint": str(self.path),
            "selection": self.checkpoint.selection,
            **{
                name: value
                for name, value in self.checkpoint.fitted.items()
                if name in ("temperature", "intercepts", "prior")
            },
        }


def models_provenance(models: Sequence[TrainedModel]) -> dict[str, Any]:
    """Return the entries of one or several models in a prediction's record.

    `models` is always a list. The same entries by themselves are lists of several models only, as in earlier records.
    """
    entries = [model.provenance() for model in models]
    alone = entries[0] if len(entries) == 1 else {name: [entry[name] for entry in entries] for name in entries[0]}
    digests = [{"weights_digest": model.checkpoint.weights_digest} for model in models]
    return alone | {"models": [entry | own for entry, own in zip(entries, digests, strict=True)]}


def check_alike(models: Sequence[TrainedModel]) -> None:
    """Raise CheckpointError unless the checkpoints' predictions can be averaged, RecipeError unless their features are
    alike.
    """
    first = models[0]
    for model in models[1:]:
        pairs = {
            "classes": (first.checkpoint.class_names, model.checkpoint.class_names),
            "targets": (first.checkpoint.task.about, model.checkpoint.task.about),
            "feature width": (first.checkpoint.model["input_dim"], model.checkpoint.model["input_dim"]),
        }
        for name, (expected, value) in pairs.items():
            if value != expected:
                raise CheckpointError(
                    f"{model.path}: its {name} are {value}, those of {first.path} are {expected}; "
                    "give checkpoints that were trained for the same"
                )
        unlike = first.recipe.differences(model.recipe)
        if unlike:
            raise RecipeError(
                f"{model.path}: was trained on features made in another way than those of {first.path} "
                f"({first_differences(unlike)}); give checkpoints of one recipe"
            )


def without_copies(models: Sequence[TrainedModel]) -> list[TrainedModel]:
    """Return the models without those of the same weights as an earlier one, which would count twice; log them."""
    first: dict[Any, TrainedModel] = {}
    for model in models:
        same = first.setdefault((str(model.checkpoint.model), model.checkpoint.weights_digest), model)
        if same is not model:
            log.warning("%s: the same weights as %s; left out, so that they count once", model.path, same.path)
    return list(first.values())


def common_feed(models: Sequence[TrainedModel], mode: str | None, chunk_size: int | None) -> SlideFeed:
    """Return how slides are fed to all models. Raises ConfigError if their evaluations differ."""
    feeds = [model.feed(mode, chunk_size) for model in models]
    for model, feed in zip(models, feeds, strict=True):
        if feed != feeds[0]:
            raise ConfigError(
                f"{models[0].path} and {model.path} were evaluated on slides fed differently "
                f"({_feed_text(feeds[0])}; {_feed_text(feed)}); give --mode"
            )
    return feeds[0]


def _feed_text(feed: SlideFeed) -> str:
    bags = "" if feed.unit == "slide" else "all of a patient as one, "
    return bags + ("whole" if feed.mode == "full" else f"in chunks of {feed.chunk_size}")


def seen_as(
    models: Sequence[TrainedModel],
    slide: str,
    case_id: str | None = None,
    content: Mapping[str, str | None] | None = None,
) -> str | None:
    """Return "slide" if a model was trained on the slide, "case" if on the patient `case_id` or that of its TCGA
    barcode, "" if on neither, None if a checkpoint does not say.

    `content` has the slide's "slide_hash" and the digest of its "features", as far as known.
    """
    records = [model.checkpoint.seen for model in models]
    ids = [("slide", slide), *(content or {}).items(), ("case", case_id), ("case", tcga_case(slide))]
    for kind, name in ids:
        if name is not None and any(id_digests(kind, [name])[0] in record.get(kind, ()) for record in records):
            return "case" if kind == "case" else "slide"
    return "" if all(record["slide"] for record in records) else None


def warn_of_spelling(models: Sequence[TrainedModel], case_ids: Iterable[str], table: Path) -> None:
    """Warn of patients of a table that no model was trained on under this name, but perhaps in another spelling."""
    records = [model.checkpoint.seen for model in models]

    def is_in(kind: str, name: str) -> bool:
        return any(id_digests(kind, [name])[0] in record.get(kind, ()) for record in records)

    doubtful = [
        name
        for name in sorted(set(case_ids))
        if not is_in("case", name) and is_in("case_spelling", plain_spelling(name))
    ]
    if doubtful:
        log.warning(
            "%s: patients whose names differ in spelling only from those of training (case, leading zeros, marks): "
            "%s; they count as unseen; if they are the same, write them as in training",
            table, first_few(doubtful),
        )  # fmt: skip


def compares_content(models: Sequence[TrainedModel]) -> bool:
    """Return whether all checkpoints record the content of the slides that they were trained on."""
    return all(model.checkpoint.seen.get("features") for model in models)


def seen_compared(models: Sequence[TrainedModel], slide: str, seen: str | None) -> str | None:
    """Return what `seen`, from `seen_as`, was found by: the slide's "name" (or its patient's), or its "content".

    Earlier checkpoints record names alone, so that a slide which was not seen by its name may be a renamed one. None if
    `seen` is unknown.
    """
    if seen == "":
        return "content" if compares_content(models) else "name"
    if seen == "slide" and seen_as(models, slide) != "slide":
        return "content"
    return seen and "name"


def seen_words(seen: str, compared: str | None) -> str:
    """Return what a model was trained on, for messages: "slide", "case", or the slide under another name."""
    return "slide, under another name" if (seen, compared) == ("slide", "content") else seen


def model_name(mil: str) -> str:
    """Return the model's own name for `--mil`, which may be an alias, or name other people's code, which is run. Raises
    ConfigError for an unknown one.
    """
    try:
        return use_mil(mil)
    except ModelError as error:
        raise ConfigError(f"--mil {mil}: {error}") from error
