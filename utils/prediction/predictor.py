"""SlidePredictor: one slide's answer from a checkpoint, the way the model was evaluated.

predictor = SlidePredictor("outputs/LiteMIL/mine/all_folds_best.pth")
prediction = predictor.predict("slide.h5")
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from MILS import ModelError, mil_name
from MILS.bag_model import BagModel
from utils.bags.settings import CohortFiles
from utils.bags.store import Bag, StoredBag, StoredFeatures, is_feature_file, open_bag
from utils.core.cohorts import tcga_case
from utils.core.device import resolve_device
from utils.core.differences import first_differences
from utils.core.errors import CheckpointError, ConfigError, FeatureFileError, RecipeError
from utils.core.recipe import ASKED_FIELDS, Recipe, mpp_difference
from utils.core.runtime import keep_freed_memory, log
from utils.core.settings import check_setting
from utils.features.backbones import canonical_backbone
from utils.features.extractor import WSIFeatureExtractor, extract_one
from utils.features.settings import Extraction
from utils.prediction.checkpoint import Checkpoint, id_digests, load_checkpoint
from utils.prediction.faithfulness import Faithfulness, measure_faithfulness
from utils.prediction.feeding import SlideFeed, mean_calibrated, mean_output, predict_features
from utils.prediction.inputs import check_input
from utils.prediction.out_of_fold import chosen_checkpoint
from utils.prediction.settings import Prediction, PredictionRecipe
from utils.slides.batch import SlideNotes
from utils.slides.slide import Slide
from utils.slides.wsi import slide_mpp
from utils.tasks.classification import Classification

SEEN = "%s: this model was trained on this %s; its prediction proves nothing"


@dataclass(frozen=True)
class SlidePrediction:
    """`probabilities (C,)`; `calibrated (C,)`, the same temperature-scaled, None where a model has no temperature;
    `attention (H, N)`, each head summing to 1 over the patches; `bag` with their places; `seen_as` "slide" or "case",
    whichever a model was trained on, "" where neither, None where a checkpoint does not record it;
    `member_probabilities (M, C)` of several models, None of a single one.
    """

    slide: str
    task: Classification
    probabilities: NDArray[np.float64]
    calibrated: NDArray[np.float64] | None
    attention: NDArray[np.float32] | None
    bag: Bag | StoredBag
    feed: SlideFeed
    seen_as: str | None
    member_probabilities: NDArray[np.float64] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.task.class_names

    @property
    def predicted_class(self) -> str:
        return self.class_names[int(self.task.decide(self.probabilities))]

    @property
    def confidence(self) -> float:
        """The predicted class's probability."""
        return float(self.probabilities.max())

    @property
    def seen_in_training(self) -> bool | None:
        return None if self.seen_as is None else bool(self.seen_as)

    @property
    def num_instances(self) -> int:
        return len(self.bag.features)

    @property
    def coords(self) -> NDArray[np.int64] | None:
        """`(N, 2)` level-0 px of the patches' top-left corners."""
        return self.bag.coords

    @property
    def patch_attention(self) -> NDArray[np.float32] | None:
        """`(N,)`, the mean over heads; sums to 1."""
        return None if self.attention is None else self.attention.mean(axis=0)

    def as_dict(self) -> dict[str, Any]:
        """What `<slide>_prediction.json` says of the slide; of several models also each one's probabilities, and their
        (sample) standard deviation.
        """
        members = self.member_probabilities
        ensemble = {} if members is None else {
            "member_probabilities": [self._by_class(one) for one in members],
            "spread": self._by_class(members.std(axis=0, ddof=1)),
        }  # fmt: skip
        return {
            "slide": self.slide,
            "predicted_class": self.predicted_class,
            "confidence": self.confidence,
            "probabilities": self._by_class(self.probabilities),
            "calibrated_probabilities": None if self.calibrated is None else self._by_class(self.calibrated),
            **ensemble,
            "num_instances": self.num_instances,
            **self.feed.as_dict(),
            "seen_in_training": self.seen_in_training,
            "seen_as": self.seen_as,
        }

    def _by_class(self, values: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(self.class_names, values.tolist(), strict=True))


@dataclass(frozen=True)
class _Trained:
    """A checkpoint, where it came from, and its model on the device."""

    path: Path
    checkpoint: Checkpoint
    model: BagModel

    def refuse(self, what: str, asked: Any, held: Any) -> None:
        """Raise CheckpointError unless the checkpoint holds what is asked of it, if anything."""
        if asked is not None and asked != held:
            found = f"records no {what}, so not" if held is None else f"was trained with {what} {held!r}, not"
            raise CheckpointError(f"{self.path}: {found} {asked!r}; leave that setting out")


class SlidePredictor:
    """A trained model, or several that answer as their mean, ready to predict feature files and, with a feature
    extractor, raw slides.

    `model_path` is a checkpoint or several, of the same classes and made for the same features; of a training run's
    folder it is the model chosen in it. Each says which model
    it holds and how slides are fed; `model_class` (a name, a class or a factory), `class_names`, `dataset` and
    `num_heads` are only checked against it. A checkpoint of the first version may not name its classes, then `dataset`
    (a known cohort) or `class_names` does, and does not tell its heads: they are `num_heads`, else those of the model
    that a factory makes, else 4. Raises CheckpointError.
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
        self.feature_extractor, self.allow_mismatch = feature_extractor, allow_mismatch
        self.trained: list[_Trained] = []
        for path in map(chosen_checkpoint, paths):
            checkpoint = load_checkpoint(path, class_names=names, dataset=dataset, num_heads=heads)
            one = _Trained(path, checkpoint, checkpoint.build().to(self.device))
            one.refuse("model_class", claimed.get("name"), checkpoint.model["name"])
            one.refuse("class_names", names, checkpoint.class_names)
            self.trained.append(one)
        if not self.trained:
            raise ConfigError("model_path: no checkpoint given; give one or several")
        self.require(dataset=dataset, num_heads=num_heads)
        _check_alike(self.trained)
        self._warned = False

    @property
    def checkpoint(self) -> Checkpoint:
        """The first one; of several, the others agree with it on classes, width and recipe."""
        return self.trained[0].checkpoint

    @property
    def path(self) -> Path:
        return self.trained[0].path

    @property
    def models(self) -> list[BagModel]:
        """One per checkpoint; an ensemble is one model."""
        return [one.model for one in self.trained]

    def predict(
        self, path: str | Path, mode: str | None = None, chunk_size: int | None = None, feat_type: str = "features"
    ) -> SlidePrediction:
        """Predict a feature file or a raw slide.

        By default the slide is fed as in the checkpoint's evaluation; `mode` "full" or "chunked" says otherwise, and
        of chunks `chunk_size` (else that of the evaluation, else 1000). Full slides are streamed from their feature
        file by every model but TransMIL: memory does not grow with them. Raises RecipeError when the features were made
        in another way than the model's, FeatureFileError, SlideError.
        """
        prediction = self.predict_bag(self.bag(Path(path), feat_type), Path(path), mode, chunk_size)
        if prediction.seen_as:
            log.warning(SEEN, path, prediction.seen_as)
        return prediction

    def bag(self, path: Path, feat_type: str = "features", slide: Path | Slide | None = None) -> Bag | StoredBag:
        """Return the bag of a feature file, its features still in there, or of a raw slide through the extractor.

        `slide`, which the feature file was made from, gives the um/px that some files' coordinates need.
        """
        feat_type = check_setting(Prediction, "feat_type", feat_type)
        check_input(path)
        if is_feature_file(path):
            return open_bag(path, feat_type, None if slide is None else slide_mpp(slide))
        with self._own_extractor().opened(path) as raw:
            return self._checked_extractor(raw).extract(raw)

    def keep_features(self, slide: Slide, folder: Path) -> Path:
        """Return the feature file of an open slide in `folder`, made unless it is there, by the same recipe."""
        target = folder / f"{slide.path.stem}.h5"
        extract_one(self._checked_extractor(slide), slide, target, told=SlideNotes(slide.told_mpp))
        return target

    def predict_bag(
        self,
        bag: Bag | StoredBag,
        path: Path,
        mode: str | None = None,
        chunk_size: int | None = None,
        case_id: str | None = None,
    ) -> SlidePrediction:
        """Predict a bag; `path` is where it came from, `case_id` its patient, by default read off a TCGA barcode."""
        self._check_bag(bag, path)
        feed = self.feed(mode, chunk_size)
        features = _features_of(bag)
        outputs = [predict_features(self.task, model, features, feed, attention=True) for model in self.models]
        output = outputs[0] if len(outputs) == 1 else mean_output(outputs)
        if not np.isfinite(output.probabilities).all():
            raise CheckpointError(f"{self.path}: its answer for {path} is not finite; train the model again")
        # It was fitted to answers of slides that were fed in the model's own way.
        checkpoints = [one.checkpoint for one in self.trained]
        temperatures = [one.temperature if one.slide_feed == feed else None for one in checkpoints]
        seen_as = self.seen_as(path.stem, case_id)
        return SlidePrediction(
            path.stem, self.task, output.probabilities, mean_calibrated(self.task, outputs, temperatures),
            output.attention, bag, feed, seen_as, output.members,
        )  # fmt: skip

    def faithfulness(self, prediction: SlidePrediction) -> Faithfulness:
        """Whether the prediction's attention matters: what the models say, of the slide fed whole, as patches are taken
        away and added in its order and in random ones, and the map of the same models with random weights.
        """
        if prediction.patch_attention is None:
            raise CheckpointError(f"{self.path}: its model gives no attention, so there is no faithfulness to measure")
        features = _features_of(prediction.bag)
        answer = int(self.task.decide(prediction.probabilities))
        return measure_faithfulness(self.task, self.models, features, prediction.patch_attention, answer)

    def gives_attention(self) -> bool:
        """Whether every model gives the attention it pays, tried on a bag of two patches."""
        bag = torch.zeros(2, self.checkpoint.model["input_dim"])
        feed = SlideFeed.of_mode("full", 2)
        return all(
            predict_features(self.task, model, bag, feed, attention=True).attention is not None for model in self.models
        )

    def require(
        self,
        *,
        mil: str | None = None,
        dataset: str | None = None,
        input_dim: int | None = None,
        num_heads: int | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """Raise CheckpointError, or RecipeError for the recipe, unless the checkpoints hold what is asked, if anything.
        A checkpoint that records no recipe contradicts none.
        """
        for one in self.trained:
            model = one.checkpoint.model
            one.refuse("mil", mil and _known_name(mil), model["name"])
            one.refuse("dataset", dataset, one.checkpoint.dataset)
            one.refuse("input_dim", input_dim, model["input_dim"])
            one.refuse("num_heads", num_heads, model.get("num_heads"))
            contradictions = (one.checkpoint.recipe or Recipe()).contradictions(recipe or Recipe())
            if contradictions:
                raise RecipeError(
                    f"{one.path}: was trained on features made in another way ({first_differences(contradictions)}); "
                    "leave those settings out, the checkpoint knows the recipe"
                )

    def provenance(self, prediction: SlidePrediction) -> dict[str, Any]:
        """Which model (of several, lists of what each is), and how the slide's features were made."""
        passport = prediction.bag.passport
        each = [
            {
                "model": one.checkpoint.model,
                "checkpoint": str(one.path),
                "selection": one.checkpoint.selection,
                "temperature": one.checkpoint.temperature,
            }
            for one in self.trained
        ]
        return {
            **(each[0] if len(each) == 1 else {name: [one[name] for one in each] for name in each[0]}),
            "recipe": passport.recipe.as_dict() if passport else None,
            "slide_record": passport.slide if passport else None,
        }

    @property
    def task(self) -> Classification:
        return self.checkpoint.task

    def feed(self, mode: str | None = None, chunk_size: int | None = None) -> SlideFeed:
        """How slides are fed: as asked, else as the checkpoints were evaluated. Raises ConfigError."""
        mode = check_setting(Prediction, "mode", mode)
        chunk_size = check_setting(Prediction, "chunk_size", chunk_size)
        feeds = [self._feed_of(one.checkpoint, mode, chunk_size) for one in self.trained]
        for one, feed in zip(self.trained, feeds, strict=True):
            if feed != feeds[0]:
                raise ConfigError(
                    f"{self.path} and {one.path} were evaluated on slides fed differently "
                    f"({_fed(feeds[0])}; {_fed(feed)}); give --mode"
                )
        return feeds[0]

    def seen_as(self, slide: str, case_id: str | None = None) -> str | None:
        """Whether a model was trained on the "slide" or on its "case", which is the one given or that of a TCGA
        barcode; "" for neither, None where a checkpoint does not say.
        """
        known = [one.checkpoint.seen for one in self.trained]
        for kind, name in (("slide", slide), ("case", case_id), ("case", tcga_case(slide))):
            if name is not None and any(id_digests(kind, [name])[0] in seen[kind] for seen in known):
                return kind
        return "" if all(seen["slide"] for seen in known) else None

    def _feed_of(self, checkpoint: Checkpoint, mode: str | None, chunk_size: int | None) -> SlideFeed:
        trained = checkpoint.slide_feed
        if mode is None or mode == trained.mode:
            is_full = trained.mode == "full"
            return trained if is_full else replace(trained, chunk_size=chunk_size or trained.chunk_size)
        return SlideFeed.of_mode(mode, chunk_size or 1000)

    def _checked_extractor(self, slide: Slide) -> WSIFeatureExtractor:
        """Return the feature extractor, checked to make features of the slide that the models can take."""
        extractor = self._own_extractor()
        self._differences(slide.path, extractor.recipe, extractor.delivered_mpp(slide))
        return extractor

    def _own_extractor(self) -> WSIFeatureExtractor:
        if self.feature_extractor is None:
            raise ConfigError(
                f"{self.path}: a raw slide needs a feature extractor; use extractPredict, or pass feature_extractor"
            )
        return self.feature_extractor

    def _check_bag(self, bag: Bag | StoredBag, path: Path) -> None:
        width, expected = bag.features.shape[1], self.checkpoint.model["input_dim"]
        found = bag.passport.recipe if bag.passport else Recipe()
        if width != expected:
            made, learned = found.backbone, (self.checkpoint.recipe or Recipe()).backbone
            raise FeatureFileError(
                f"{path}: features are {width} wide ({made or 'of a backbone that is not recorded'}), the model of "
                f"{self.path} takes {expected} ({learned or 'not recorded'}); extract the slide with the backbone that "
                "the model was trained on"
            )
        mpp = bag.passport.slide.get("mpp_delivered") if bag.passport else None
        for told in self._differences(path, found, mpp):
            log.warning("%s: made in another way than the training features (%s)", path, told)
        for one in self.trained:
            self._warn_of_unknown(path, one.checkpoint, found, mpp)

    def _differences(self, path: Path, found: Recipe, mpp: float | None) -> list[str]:
        """In what a slide's features differ from the training's, each said once; RecipeError unless that is allowed."""
        all_told = []
        for one in self.trained:
            unlike = (one.checkpoint.recipe or Recipe()).differences(found)
            told = first_differences([*unlike, *mpp_difference(one.checkpoint.mpp_range, mpp)])
            if told and not self.allow_mismatch:
                raise RecipeError(
                    f"{path}: made in another way than the features {one.path} was trained on ({told}); "
                    "extract it with the training recipe, or give --allow_mismatch"
                )
            if told and told not in all_told:
                all_told.append(told)
        return all_told

    def _warn_of_unknown(self, path: Path, checkpoint: Checkpoint, found: Recipe, mpp: float | None) -> None:
        unknown = (checkpoint.recipe or Recipe()).unknown_fields(found)
        if mpp is None or checkpoint.mpp_range is None:
            unknown.append("mpp")
        if unknown and not self._warned:
            log.warning(
                "%s: %s not recorded on both sides, so not compared with the training", path, ", ".join(unknown)
            )
            self._warned = True


def _features_of(bag: Bag | StoredBag) -> torch.Tensor | StoredFeatures:
    return bag.features if isinstance(bag.features, StoredFeatures) else torch.from_numpy(bag.features)


def _check_alike(trained: Sequence[_Trained]) -> None:
    """Raise CheckpointError unless the checkpoints' answers can be averaged, RecipeError unless their features are of
    one kind.
    """
    first = trained[0]
    for other in trained[1:]:
        pairs = [(one.checkpoint.class_names, one.checkpoint.model["input_dim"]) for one in (first, other)]
        for what, (one, another) in zip(("classes", "feature width"), zip(*pairs, strict=True), strict=True):
            if one != another:
                raise CheckpointError(
                    f"{other.path}: its {what} are {another}, those of {first.path} are {one}; "
                    "give checkpoints that were trained for the same"
                )
        unlike = (first.checkpoint.recipe or Recipe()).differences(other.checkpoint.recipe or Recipe())
        if unlike:
            raise RecipeError(
                f"{other.path}: was trained on features made in another way than those of {first.path} "
                f"({first_differences(unlike)}); give checkpoints of one recipe"
            )


def _fed(feed: SlideFeed) -> str:
    return "whole" if feed.mode == "full" else f"in chunks of {feed.chunk_size}"


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
    """A SlidePredictor for raw slides: patches are cut and encoded as the model's training features were.

    Where the checkpoint records the recipe, `backbone`, `patch_size`, `stride`, `level`, `mpp` and `tissue_threshold`
    must agree with it, or tell what it leaves open; else they make the recipe. `weights` is the backbone's local file
    instead of a download. Raises RecipeError, BackboneError, CheckpointError.
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
    asked = PredictionRecipe(
        backbone=backbone, patch_size=patch_size, stride=stride, level=level, mpp=mpp, batch_size=batch_size,
        tissue_threshold=tissue_threshold, weights=Path(weights) if weights else None,
    )  # fmt: skip
    predictor.feature_extractor = _training_extractor(predictor, asked, device)
    return predictor


def _training_extractor(predictor: SlidePredictor, asked: PredictionRecipe, device: str) -> WSIFeatureExtractor:
    """Return what extracts as the training features were; what is asked for completes their recipe, or makes it."""
    given, recorded = asked_recipe(asked), predictor.checkpoint.recipe
    predictor.require(recipe=given)
    running: dict[str, Any] = {"weights": asked.weights, "batch_size": asked.batch_size, "device": device}
    if recorded is None:
        return WSIFeatureExtractor(**given.as_dict(), **running)
    by_default = {"tissue_threshold": Extraction.tissue_threshold, "dtype": Extraction.dtype}
    return WSIFeatureExtractor.of_recipe(recorded.completed(given, **by_default), **running)


def asked_recipe(settings: PredictionRecipe) -> Recipe:
    """Return what the settings of `predict.py` say of the recipe. Raises BackboneError for an unknown backbone."""
    given = Recipe(**{name: getattr(settings, name) for name in ASKED_FIELDS})
    return given if given.backbone is None else replace(given, backbone=canonical_backbone(given.backbone))


def _known_name(mil: str) -> str:
    try:
        return mil_name(mil)
    except ModelError as error:
        raise ConfigError(f"--mil {mil}: {error}") from error


def _claimed_spec(model_class: Any) -> dict[str, Any]:
    """What a name, a class or a factory says of the model: its name, and a factory of ours the rest of its spec."""
    if model_class is None:
        return {}
    if isinstance(model_class, str | type):
        return {"name": model_class if isinstance(model_class, str) else model_class.__name__}
    model = model_class()
    return getattr(model, "spec", {"name": type(model).__name__})
