"""SlidePredictor: predict a slide with a checkpoint, the way the model was evaluated.

predictor = SlidePredictor("outputs/LiteMIL/mine/all_folds_best.pth")
prediction = predictor.predict("slide.h5")
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from MILS.bag_model import BagModel, ModelError
from MILS.ensemble import members_of
from MILS.registry import makes_others
from utils.bags.cases import JoinedFeatures
from utils.bags.content_digest import DigestedFeatures, features_digest
from utils.bags.settings import CohortFiles
from utils.bags.store import Bag, StoredBag, StoredFeatures, is_feature_file, open_bag
from utils.core.device import resolve_device, set_tf32, uses_tf32
from utils.core.differences import first_differences
from utils.core.errors import CheckpointError, ConfigError, RecipeError, first_few
from utils.core.recipe import ASKED_FIELDS, PATCH_CHOICE_FIELDS, Recipe
from utils.core.runtime import keep_freed_memory, log
from utils.core.settings import check_setting
from utils.features.backbones import canonical_backbone
from utils.features.extractor import WSIFeatureExtractor
from utils.features.one_slide import extract_one
from utils.features.settings import Extraction
from utils.prediction.checkpoint import Checkpoint, load_checkpoint
from utils.prediction.faithfulness import Faithfulness, measure_faithfulness
from utils.prediction.forward_pass import SlideFeed, mean_calibrated, mean_output, predict_features
from utils.prediction.inputs import check_input
from utils.prediction.out_of_fold import chosen_checkpoint
from utils.prediction.settings import Prediction, PredictionRecipe
from utils.prediction.slide_prediction import SEEN, SlidePrediction, parts_of
from utils.prediction.trained_model import (
    TrainedModel,
    check_alike,
    common_feed,
    compares_content,
    model_name,
    models_provenance,
    seen_as,
    seen_compared,
    seen_words,
    without_copies,
)
from utils.slides.batch import SlideNotes
from utils.slides.find import is_slide_file
from utils.slides.open_slides import slide_mpp
from utils.slides.slide import Slide
from utils.tasks.task import FittedFigures, Task


class SlidePredictor:
    """A trained model, or several whose predictions are averaged, for feature files and raw slides.

    `model_path` is a checkpoint or several, of the same classes and made for the same features; a training run's folder
    stands for the model chosen in it. Files of the same weights count once. A checkpoint records its model and how
    slides are fed; `model_class` (a name, a class or a factory), `class_names`, `dataset` and `num_heads` are only
    checked against it. A checkpoint of the first version may lack its class names, which are then those of `dataset` (a
    known cohort) or `class_names`, and lacks its number of heads: it is `num_heads`, else that of the factory's model,
    else 4. Raises CheckpointError.
    """

    def __init__(
        self,
        model_path: str | Path | Sequence[str | Path],
        model_class: Any = None,
        class_names: Sequence[str] | None = None,
        device: str = "auto",
        feature_extractor: WSIFeatureExtractor | None = None,
        *,
        dataset: str | None = None,
        num_heads: int | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        paths = model_path if isinstance(model_path, Iterable) and not isinstance(model_path, str) else [model_path]
        paths = check_setting(Prediction, "checkpoint", list(paths))
        claimed = _claimed_spec(model_class)
        names = check_setting(CohortFiles, "class_names", class_names)
        heads = claimed.get("num_heads") if num_heads is None else num_heads
        keep_freed_memory()
        self.device = resolve_device(device)
        self.feature_extractor, self.allow_mismatch, self.precision = feature_extractor, allow_mismatch, "auto"
        self.trained: list[TrainedModel] = []
        for path in map(chosen_checkpoint, paths):
            checkpoint = load_checkpoint(path, class_names=names, dataset=dataset, num_heads=heads)
            model = TrainedModel(path, checkpoint, checkpoint.build().to(self.device))
            model.require(model_class=claimed.get("name"), class_names=names)
            self.trained.append(model)
        if not self.trained:
            raise ConfigError("model_path: no checkpoint given; give one or several")
        self.require(dataset=dataset, num_heads=num_heads)
        check_alike(self.trained)
        self.trained = without_copies(self.trained)
        self._warned = False

    @property
    def checkpoint(self) -> Checkpoint:
        """Return the first checkpoint; the others agree with it on classes, width and recipe."""
        return self.trained[0].checkpoint

    @property
    def path(self) -> Path:
        return self.trained[0].path

    @property
    def models(self) -> list[BagModel]:
        """Return the model of each checkpoint; an ensemble is one model."""
        return [each.model for each in self.trained]

    def predict(
        self, path: str | Path, mode: str | None = None, chunk_size: int | None = None, feat_type: str = "features"
    ) -> SlidePrediction:
        """Predict a feature file or a raw slide.

        By default the slide is fed as in the checkpoint's evaluation; `mode` "full" or "chunked" overrides that, and
        `chunk_size` the size of its chunks (default: that of the evaluation, else 1000). Every model but TransMIL
        streams full slides from their file. Raises RecipeError for features of another recipe, FeatureFileError,
        SlideError.
        """
        prediction = self.predict_bag(self.bag(Path(path), feat_type), Path(path), mode, chunk_size)
        if prediction.seen_as:
            compared = seen_compared(self.trained, prediction.slide, prediction.seen_as)
            log.warning(SEEN, path, seen_words(prediction.seen_as, compared))
        return prediction

    def bag(self, path: Path, feat_type: str = "features", slide: Path | Slide | None = None) -> Bag | StoredBag:
        """Return the bag of a feature file, without reading its features yet, or that of a raw slide by the extractor.

        `slide`, which the feature file was made from, gives the um/px that the coordinates of some files need.
        """
        feat_type = check_setting(Prediction, "feat_type", feat_type)
        check_input(path)
        if is_feature_file(path):
            return open_bag(path, feat_type, None if slide is None else slide_mpp(slide))
        with self._own_extractor().opened(path) as raw:
            return self._checked_extractor(raw).extract(raw)

    def keep_features(self, slide: Slide, folder: Path, overwrite: bool = False) -> Path:
        """Return the feature file of an open slide in `folder`; extract it unless it exists, with the same recipe.

        Raises RecipeError if the file holds something else, unless `overwrite` is given.
        """
        target, extractor = folder / f"{slide.path.stem}.h5", self._checked_extractor(slide)
        notes = SlideNotes(slide.user_mpp)
        try:
            extract_one(extractor, slide, target, notes=notes)
        except RecipeError:
            if not overwrite:
                raise
            extract_one(extractor, slide, target, overwrite=True, notes=notes)
        return target

    def predict_bag(
        self,
        bag: Bag | StoredBag,
        path: Path,
        mode: str | None = None,
        chunk_size: int | None = None,
        case_id: str | None = None,
        *,
        evidence: bool = False,
    ) -> SlidePrediction:
        """Predict a bag from the file `path`; `case_id` is its patient, by default that of a TCGA barcode.

        With `evidence` the prediction says what each patch argues, for one more pass over the patches.
        """
        return self.predict_bags({path: bag}, mode, chunk_size, case_id, evidence=evidence)[0]

    def predict_bags(
        self,
        bags: Mapping[Path, Bag | StoredBag],
        mode: str | None = None,
        chunk_size: int | None = None,
        case_id: str | None = None,
        *,
        evidence: bool = False,
    ) -> list[SlidePrediction]:
        """Predict the bags of a patient's slides, by their files, as one bag; return what it says of each slide.

        The answer is the same for all. Attention sums to 1 over the patches of all slides.
        """
        for path, bag in bags.items():
            self._check_bag(bag, path)
        set_tf32(self.device, uses_tf32(self.precision, self.device))
        each, feed = [_features_of(bag) for bag in bags.values()], self.feed(mode, chunk_size)
        if compares_content(self.trained):
            each = [DigestedFeatures(part) if isinstance(part, StoredFeatures) else part for part in each]
        features = each[0] if len(each) == 1 else JoinedFeatures(each)
        # Each by its own task, which holds what is fitted to its training slides.
        with _as_checkpoint_errors(first_few([str(path) for path in bags])):
            outputs = [
                predict_features(trained.checkpoint.task, trained.model, features, feed, True, evidence)
                for trained in self.trained
            ]
        output = outputs[0] if len(outputs) == 1 else mean_output(outputs)
        if not np.isfinite(output.probabilities).all():
            paths = first_few([str(path) for path in bags])
            raise CheckpointError(f"{self.path}: its output for {paths} is not finite; train the model again")
        fitted = [model.fitted_to(feed) for model in self.trained]
        calibrated = mean_calibrated(self.task, outputs, fitted)
        seen = [
            seen_as(self.trained, path.stem, case_id, _content(bag, part, self.trained))
            for (path, bag), part in zip(bags.items(), each, strict=True)
        ]
        whole = SlidePrediction(
            "", self.task, output.probabilities, calibrated, output.attention, next(iter(bags.values())), feed, None,
            output.members, output.evidence, _decided(self.task, fitted, output.each),
        )  # fmt: skip
        return parts_of(whole, bags, seen, case_id)

    def faithfulness(self, prediction: SlidePrediction) -> Faithfulness:
        """Measure whether the prediction's attention and evidence matter (see `measure_faithfulness`)."""
        if prediction.patch_attention is None:
            raise CheckpointError(f"{self.path}: its model gives no attention, so there is no faithfulness to measure")
        with _as_checkpoint_errors(prediction.slide):
            return _faithfulness_of(self.task, self.models, prediction)

    def gives_attention(self) -> bool:
        """Return whether every model returns attention, for a bag of two patches."""
        bag, feed = torch.zeros(2, self.checkpoint.model["input_dim"]), SlideFeed.of_mode("full", 2)
        with _as_checkpoint_errors(str(self.path)):
            outputs = [predict_features(self.task, model, bag, feed, attention=True) for model in self.models]
        return all(output.attention is not None for output in outputs)

    def notes(self) -> list[str]:
        """Return what users should know of how the models' answers are taken."""
        return [note for model in self.models for member in members_of(model) for note in member.notes]

    def models_without_evidence(self) -> list[str]:
        """Return the names of the models that do not say what each patch argues."""
        return _without_evidence([member for model in self.models for member in members_of(model)])

    def require(self, *, recipe: Recipe | None = None, **expected: Any) -> None:
        """Raise CheckpointError unless the checkpoints hold what is expected (see `TrainedModel.require`), and
        RecipeError if the `recipe` contradicts a recipe that they record.
        """
        for model in self.trained:
            model.require(**expected)
            model.require_recipe(recipe or Recipe())

    def provenance(self, prediction: SlidePrediction) -> dict[str, Any]:
        """Return the models' entries in a prediction's record, and how the slide's features were made."""
        passport = prediction.bag.passport
        return {
            **models_provenance(self.trained),
            "recipe": passport.recipe.as_dict() if passport else None,
            "slide_record": passport.slide if passport else None,
            "seen_compared": seen_compared(self.trained, prediction.slide, prediction.seen_as),
        }

    @property
    def task(self) -> Task:
        return self.checkpoint.task

    def feed(self, mode: str | None = None, chunk_size: int | None = None) -> SlideFeed:
        """Return how slides are fed: as given, else as in the checkpoints' evaluation. Raises ConfigError."""
        mode = check_setting(Prediction, "mode", mode)
        chunk_size = check_setting(Prediction, "chunk_size", chunk_size)
        return common_feed(self.trained, mode, chunk_size)

    def _checked_extractor(self, slide: Slide) -> WSIFeatureExtractor:
        """Return the feature extractor. Raises RecipeError if the slide's features would differ from the training's."""
        extractor = self._own_extractor()
        _differences(self, slide.path, extractor.recipe, extractor.delivered_mpp(slide))
        return extractor

    def _own_extractor(self) -> WSIFeatureExtractor:
        if self.feature_extractor is None:
            raise ConfigError(
                f"{self.path}: a raw slide needs a feature extractor; use extractPredict, or pass feature_extractor"
            )
        return self.feature_extractor

    def _check_bag(self, bag: Bag | StoredBag, path: Path) -> None:
        """Check that a bag fits the models. Warn of what differs from the training features or cannot be compared."""
        recipe = bag.passport.recipe if bag.passport else Recipe()
        self.trained[0].check_width(bag.features.shape[1], recipe, path)
        mpp = bag.passport.slide.get("mpp_delivered") if bag.passport else None
        for difference in _differences(self, path, recipe, mpp):
            log.warning("%s: made in another way than the training features (%s)", path, difference)
        unknown = next(filter(None, (model.unknown_fields(recipe, mpp) for model in self.trained)), [])
        if unknown and not self._warned:
            text = "%s: %s not recorded on both sides, so not compared with the training"
            log.warning(text, path, ", ".join(unknown))
            self._warned = True


@contextmanager
def _as_checkpoint_errors(about: str) -> Iterator[None]:
    """Raise what a model cannot do with a bag, such as an error in other people's code, as a CheckpointError."""
    try:
        yield
    except ModelError as error:
        raise CheckpointError(f"{about}: {error}") from error


def _faithfulness_of(task: Task, models: Sequence[BagModel], prediction: SlidePrediction) -> Faithfulness:
    features, class_index = _features_of(prediction.bag), int(task.decide(prediction.probabilities))
    # Only what argues for this class by itself should lower its probability when it is taken away.
    has_own = prediction.evidence is not None and task.signal_names == task.outputs
    evidence = prediction.evidence.contributions[class_index] if prediction.evidence and has_own else None
    assert prediction.patch_attention is not None  # noqa: S101 - for the type checker: checked by the caller
    return measure_faithfulness(task, models, features, prediction.patch_attention, class_index, evidence=evidence)


def _decided(task: Task, fitted: Sequence[FittedFigures | None], values: np.ndarray) -> str | None:
    """Return the decision of a slide in words; what was fitted to one model says nothing of several."""
    return task.decision_text(fitted[0], values) if len(fitted) == 1 and fitted[0] is not None else None


def _without_evidence(models: Sequence[BagModel]) -> list[str]:
    silent = [model for model in models if not model.gives_evidence]
    return list(dict.fromkeys(str(model.spec["name"]) for model in silent))


def _differences(predictor: SlidePredictor, path: Path, recipe: Recipe, mpp: float | None) -> list[str]:
    """Return how a slide's features differ from the training's. Raises RecipeError unless that is allowed."""
    differences = {model.path: model.differences(recipe, mpp) for model in predictor.trained}
    for model_path, difference in differences.items():
        if difference and not predictor.allow_mismatch:
            raise RecipeError(
                f"{path}: made in another way than the features {model_path} was trained on ({difference}); "
                f"{_remedy(predictor, path, recipe, mpp)}, or give --allow_mismatch"
            )
    return list(dict.fromkeys(filter(None, differences.values())))


def _content(
    bag: Bag | StoredBag, features: torch.Tensor | StoredFeatures, models: Sequence[TrainedModel]
) -> dict[str, str | None]:
    """Return what identifies a slide's content, as far as checkpoints record the same of their training slides."""
    content = {"slide_hash": bag.passport.slide_hash if bag.passport else None}
    if isinstance(features, DigestedFeatures):
        content["features"] = features.digest()
    elif isinstance(features, torch.Tensor) and compares_content(models):
        content["features"] = features_digest(features)
    return content


def _remedy(predictor: SlidePredictor, path: Path, recipe: Recipe, mpp: float | None) -> str:
    """Return what to do about a slide or feature file whose recipe or `mpp` differs from the training's."""
    if not is_slide_file(path):
        return "extract it with the training recipe"
    trained_mpp = _trained_mpp(predictor)
    if recipe.mpp is None and mpp is not None and trained_mpp is not None and mpp < trained_mpp:
        return f"give --mpp {trained_mpp:.4g}, which resamples it to that"
    return "leave it out"


def _trained_mpp(predictor: SlidePredictor) -> float | None:
    """Return the um/px of the first model's training patches, in the middle of their range; None unless all models
    record theirs.
    """
    ranges = [model.checkpoint.mpp_range for model in predictor.trained]
    return None if None in ranges or ranges[0] is None else sum(ranges[0]) / 2


def _features_of(bag: Bag | StoredBag) -> torch.Tensor | StoredFeatures:
    return bag.features if isinstance(bag.features, StoredFeatures) else torch.from_numpy(bag.features)


def extractPredict(  # noqa: N802 - the first version's public name
    model_path: str | Path | Sequence[str | Path],
    model_class: Any = None,
    class_names: Sequence[str] | None = None,
    backbone: str | None = None,
    patch_size: int | None = None,
    stride: int | None = None,
    level: int | None = None,
    device: str = "auto",
    *,
    weights: str | Path | None = None,
    tissue_threshold: float | None = None,
    mpp: float | None = None,
    batch_size: int = Extraction.batch_size,
    dataset: str | None = None,
    num_heads: int | None = None,
    allow_mismatch: bool = False,
) -> SlidePredictor:
    """Return a SlidePredictor for raw slides, whose patches are cut and encoded like the training features.

    If the checkpoint records a recipe, `backbone`, `patch_size`, `level` and `mpp` must agree with it, and fill its
    gaps; otherwise they are the recipe. `stride` and `tissue_threshold` may differ: they choose the patches, and each
    is encoded as in training. `mpp` may replace a level if every slide then has the um/px of the training patches.
    `weights` is the backbone's local file instead of a download. Raises RecipeError, BackboneError, CheckpointError.
    """
    predictor = SlidePredictor(
        model_path,
        model_class,
        class_names,
        device,
        dataset=dataset,
        num_heads=num_heads,
        allow_mismatch=allow_mismatch,
    )
    settings = PredictionRecipe(
        backbone=backbone, patch_size=patch_size, stride=stride, level=level, mpp=mpp, batch_size=batch_size,
        tissue_threshold=tissue_threshold, weights=Path(weights) if weights else None,
    )  # fmt: skip
    predictor.feature_extractor = _training_extractor(predictor, settings, device)
    return predictor


def _training_extractor(predictor: SlidePredictor, settings: PredictionRecipe, device: str) -> WSIFeatureExtractor:
    """Return an extractor with the recipe of the training features; the settings fill its gaps, or are the recipe."""
    flags, recorded = flags_recipe(settings), predictor.checkpoint.recipe
    running: dict[str, Any] = {"weights": settings.weights, "batch_size": settings.batch_size, "device": device}
    if recorded is None:
        predictor.require(recipe=flags)
        return WSIFeatureExtractor(**flags.as_dict(), **running)
    # Instead of a level, whose um/px differ between scanners; each slide's are compared with those of training.
    resamples = flags.level is None and recorded.mpp is None and _trained_mpp(predictor) is not None
    encoding = replace(flags, stride=None, tissue_threshold=None, mpp=None if resamples else flags.mpp)
    predictor.require(recipe=encoding)
    defaults = {"tissue_threshold": Extraction.tissue_threshold, "dtype": Extraction.dtype}
    recipe = recorded.completed(encoding, **defaults)
    other_patches = recipe.differences(flags, PATCH_CHOICE_FIELDS)
    if other_patches:
        log.warning(
            "the patches are chosen in another way than in training (%s); each is encoded as there",
            first_differences(other_patches),
        )
    recipe = replace(recipe, **{name: flags[name] for name in PATCH_CHOICE_FIELDS if flags[name] is not None})
    if resamples and flags.mpp is not None:
        recipe = replace(recipe, level=None, mpp=flags.mpp)
    return WSIFeatureExtractor.of_recipe(recipe, **running)


def flags_recipe(settings: PredictionRecipe) -> Recipe:
    """Return the recipe of the settings that are given. Raises BackboneError for an unknown backbone."""
    recipe = Recipe(**{name: getattr(settings, name) for name in ASKED_FIELDS})
    return recipe if recipe.backbone is None else replace(recipe, backbone=canonical_backbone(recipe.backbone))


def _claimed_spec(model_class: Any) -> dict[str, Any]:
    """Return what a name, a class or a factory says of the model: its name and, for our factories, its whole spec.
    Other people's code may run from here on, as it is named.
    """
    if model_class is None:
        return {}
    if isinstance(model_class, str):
        return {"name": model_name(model_class) if ":" in model_class else model_class}
    if makes_others(model_class):
        return {"name": model_name(model_class)}
    if isinstance(model_class, type):
        return {"name": model_class.__name__}
    model = model_class()
    return getattr(model, "spec", {"name": type(model).__name__})
