"""SlidePredictor: one slide's answer from a checkpoint, the way the model was evaluated.

predictor = SlidePredictor("outputs/LiteMIL/mine/all_folds_best.pth")
prediction = predictor.predict("slide.h5")
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from MILS import ModelError, mil_name
from utils.bags.store import Bag, is_feature_file, read_bag
from utils.core.config import Extraction, Prediction, PredictionRecipe
from utils.core.errors import CheckpointError, ConfigError, FeatureFileError, RecipeError
from utils.core.passport import COMPARED_FIELDS, ENCODING_FIELDS, mpp_difference, recipe_differences, unknown_fields
from utils.core.runtime import log, resolve_device
from utils.feature_extractor import WSIFeatureExtractor, extract_one
from utils.learning.aggregation import SlideFeed, predict_features
from utils.learning.checkpoint import id_digests, load_checkpoint
from utils.slides.backbones import canonical_backbone
from utils.slides.wsi import is_slide_file, slide_mpp


@dataclass(frozen=True)
class SlidePrediction:
    """`probabilities (C,)`; `attention (H, N)`, each head summing to 1 over the patches; `bag` with their places;
    `seen_in_training` None where the checkpoint does not record what it was trained on; `member_probabilities (M, C)`
    of an ensemble's models, None of a single one.
    """

    slide: str
    class_names: tuple[str, ...]
    probabilities: NDArray[np.float64]
    attention: NDArray[np.float32] | None
    bag: Bag
    feed: SlideFeed
    seen_in_training: bool | None
    member_probabilities: NDArray[np.float64] | None = None

    @property
    def predicted_class(self) -> str:
        return self.class_names[int(self.probabilities.argmax())]

    @property
    def confidence(self) -> float:
        """The predicted class's probability."""
        return float(self.probabilities.max())

    @property
    def patch_attention(self) -> NDArray[np.float32] | None:
        """`(N,)`, the mean over heads; sums to 1."""
        return None if self.attention is None else self.attention.mean(axis=0)

    def as_dict(self) -> dict[str, Any]:
        """What `<slide>_prediction.json` says of the slide; of an ensemble also each model's probabilities, and their
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
            **ensemble,
            "num_instances": len(self.bag.features),
            **self.feed.as_dict(),
            "seen_in_training": self.seen_in_training,
        }

    def _by_class(self, values: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(self.class_names, values.tolist(), strict=True))


class SlidePredictor:
    """A trained model, ready to predict feature files and, with a feature extractor, raw slides.

    The checkpoint says which model and classes it holds and how slides are fed; `model_class` (a name, a class or a
    factory), `class_names`, `dataset` and `num_heads` are only checked against it. A checkpoint of the first version
    may not name its classes, then `dataset` (a known cohort) or `class_names` does, and does not tell its heads: they
    are `num_heads`, else those of the model that a factory makes, else 4. Raises CheckpointError.
    """

    def __init__(
        self,
        model_path: str | Path,
        model_class: Any = None,
        class_names: Sequence[str] | None = None,
        device: str = "auto",
        feature_extractor: WSIFeatureExtractor | None = None,
        *,
        dataset: str | None = None,
        num_heads: int | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        self.path, claimed = Path(model_path), _claimed_spec(model_class)
        names = None if class_names is None else tuple(class_names)
        heads = claimed.get("num_heads") if num_heads is None else num_heads
        self.checkpoint = load_checkpoint(self.path, class_names=names, dataset=dataset, num_heads=heads)
        self.device = resolve_device(device)
        self.feature_extractor, self.allow_mismatch = feature_extractor, allow_mismatch
        self._check("model_class", claimed.get("name"), self.checkpoint.model["name"])
        self._check("class_names", names, self.checkpoint.class_names)
        self.require(dataset=dataset, num_heads=num_heads)
        self.model = self.checkpoint.build().to(self.device)
        self._warned = False

    def predict(
        self, path: str | Path, mode: str | None = None, chunk_size: int | None = None, feat_type: str = "features"
    ) -> SlidePrediction:
        """Predict a feature file or a raw slide.

        By default the slide is fed as in the checkpoint's evaluation; `mode` "full" or "chunked" and `chunk_size` say
        otherwise. Raises RecipeError when the features were made in another way than the model's, FeatureFileError,
        SlideError.
        """
        return self.predict_bag(self.bag(Path(path), feat_type), Path(path), mode, chunk_size)

    def bag(self, path: Path, feat_type: str = "features", slide: Path | None = None) -> Bag:
        """The bag of a feature file, or of a raw slide through the feature extractor.

        `slide`, which the feature file was made from, gives the um/px that some files' coordinates need.
        """
        check_input(path)
        if not is_feature_file(path):
            return self._extractor().extract(path)
        return read_bag(path, feat_type, None if slide is None else slide_mpp(slide))

    def keep_features(self, slide: Path, folder: Path) -> Path:
        """The raw slide's feature file in `folder`, made unless it is there, by the same recipe."""
        target = folder / f"{slide.stem}.h5"
        extract_one(self._extractor(), slide, target)
        return target

    def predict_bag(
        self, bag: Bag, path: Path, mode: str | None = None, chunk_size: int | None = None
    ) -> SlidePrediction:
        """Predict a bag in memory; `path` is where it came from."""
        self._check_bag(bag, path)
        feed = self._feed(mode, chunk_size)
        output = predict_features(self.model, torch.from_numpy(bag.features), feed, attention=True)
        known = self.checkpoint.seen["slide"]
        seen = id_digests("slide", [path.stem])[0] in known if known else None
        if seen:
            log.warning("%s: this model was trained on this slide; its prediction proves nothing", path)
        return SlidePrediction(
            path.stem, self.checkpoint.class_names, output.probabilities, output.attention, bag, feed, seen,
            output.members,
        )  # fmt: skip

    def require(
        self,
        *,
        mil: str | None = None,
        dataset: str | None = None,
        input_dim: int | None = None,
        num_heads: int | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise CheckpointError, or RecipeError for the recipe, unless the checkpoint holds what is asked, if anything.
        A checkpoint that records no recipe contradicts none.
        """
        self._check("mil", mil and _known_name(mil), self.checkpoint.model["name"])
        self._check("dataset", dataset, self.checkpoint.dataset)
        self._check("input_dim", input_dim, self.checkpoint.model["input_dim"])
        self._check("num_heads", num_heads, self.checkpoint.model.get("num_heads"))
        asked = recipe or {}
        differences = recipe_differences(self.checkpoint.recipe or {}, asked, asked)
        if differences:
            raise RecipeError(
                f"{self.path}: was trained on features made in another way ({'; '.join(differences)}); "
                "leave those settings out, the checkpoint knows the recipe"
            )

    def provenance(self, prediction: SlidePrediction) -> dict[str, Any]:
        """Which model, and how the slide's features were made."""
        passport = prediction.bag.passport
        return {
            "model": self.checkpoint.model,
            "checkpoint": str(self.path),
            "selection": self.checkpoint.selection,
            "recipe": passport.recipe if passport else None,
            "slide_record": passport.slide if passport else None,
        }

    def _extractor(self) -> WSIFeatureExtractor:
        if self.feature_extractor is None:
            raise ConfigError(
                f"{self.path}: a raw slide needs a feature extractor; use extractPredict, or pass feature_extractor"
            )
        return self.feature_extractor

    def _feed(self, mode: str | None, chunk_size: int | None) -> SlideFeed:
        trained = self.checkpoint.slide_feed
        if chunk_size is not None and (mode or trained.mode) == "full":
            raise ConfigError("--chunk_size has no meaning in full mode; give --mode chunked with it")
        if mode is None or mode == trained.mode:
            return replace(trained, chunk_size=chunk_size or trained.chunk_size)
        if mode not in ("full", "chunked"):
            raise ConfigError(f"mode {mode!r} is unknown; use 'full' or 'chunked'")
        return SlideFeed.of_mode(mode, chunk_size or 1000)

    def _check(self, what: str, asked: Any, held: Any) -> None:
        if asked is not None and asked != held:
            found = f"records no {what}, so not" if held is None else f"was trained with {what} {held!r}, not"
            raise CheckpointError(f"{self.path}: {found} {asked!r}; leave that setting out")

    def _check_bag(self, bag: Bag, path: Path) -> None:
        width, expected = bag.features.shape[1], self.checkpoint.model["input_dim"]
        if width != expected:
            raise FeatureFileError(
                f"{path}: features are {width} wide, the model of {self.path} takes {expected}; "
                "extract the slide with the backbone that the model was trained on"
            )
        trained, passport = self.checkpoint.recipe, bag.passport
        found = passport.recipe if passport else {}
        mpp = passport.slide.get("mpp_delivered") if passport else None
        differences = recipe_differences(trained or {}, found, COMPARED_FIELDS)
        differences += mpp_difference(self.checkpoint.mpp_range, mpp)
        if differences and not self.allow_mismatch:
            raise RecipeError(
                f"{path}: made in another way than the features {self.path} was trained on ({'; '.join(differences)}); "
                "extract it with the training recipe, or give --allow_mismatch"
            )
        if differences:
            log.warning("%s: made in another way than the training features (%s)", path, "; ".join(differences))
        self._warn_of_unknown(path, trained or {}, found, mpp)

    def _warn_of_unknown(self, path: Path, trained: dict[str, Any], found: dict[str, Any], mpp: float | None) -> None:
        unknown = unknown_fields(trained, found, ENCODING_FIELDS)
        if mpp is None or self.checkpoint.mpp_range is None:
            unknown.append("mpp")
        if unknown and not self._warned:
            log.warning(
                "%s: %s not recorded on both sides, so not compared with the training", path, ", ".join(unknown)
            )
            self._warned = True


def check_input(path: Path) -> None:
    """Raise FeatureFileError unless `path` is a file that, by its ending, can be predicted."""
    if not path.is_file():
        raise FeatureFileError(f"{path}: no such file; give a feature file (.h5, .pt, .pth) or a slide")
    if not is_feature_file(path) and not is_slide_file(path):
        raise FeatureFileError(
            f"{path}: neither a feature file (.h5, .pt, .pth) nor a slide, by its ending {path.suffix!r}"
        )


def extractPredict(  # noqa: N802 - the first version's public name
    model_path: str | Path,
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
    given = recipe_asked(backbone, patch_size, stride, level, mpp, tissue_threshold)
    predictor.require(recipe=given)
    recorded = predictor.checkpoint.recipe
    weights = Path(weights) if weights else None
    if recorded is None:
        extractor = WSIFeatureExtractor(**given, weights=weights, batch_size=batch_size, device=device)
    else:
        extractor = WSIFeatureExtractor.of_recipe(
            _completed(recorded, given), weights=weights, batch_size=batch_size, device=device
        )
    predictor.feature_extractor = extractor
    return predictor


def make_predictor(asked: Prediction, recipe: PredictionRecipe) -> SlidePredictor:
    """The predictor `predict.py` is asked for, with a feature extractor where the input is a raw slide.

    Raises ConfigError for settings that go with raw slides only, and what SlidePredictor and extractPredict raise.
    """
    cutting: dict[str, Any] = {
        name: getattr(recipe, name) for name in ("backbone", "patch_size", "stride", "level", "mpp", "tissue_threshold")
    }
    said: dict[str, Any] = {name: getattr(asked, name) for name in ("device", "dataset", "num_heads", "allow_mismatch")}
    if is_feature_file(asked.input):
        if recipe.save_features or recipe.weights:
            raise ConfigError(
                f"{asked.input}: holds features already; --save_features and --weights go with a raw slide"
            )
        predictor = SlidePredictor(asked.checkpoint, **said)
        predictor.require(recipe=recipe_asked(**cutting))
    else:
        predictor = extractPredict(
            asked.checkpoint, **cutting, **said, weights=recipe.weights, batch_size=recipe.batch_size
        )
    predictor.require(mil=asked.mil, input_dim=asked.input_dim)
    return predictor


def recipe_asked(
    backbone: str | None,
    patch_size: int | None,
    stride: int | None,
    level: int | None,
    mpp: float | None,
    tissue_threshold: float | None,
) -> dict[str, Any]:
    """The settings that were given (are not None), as a recipe names them."""
    settings = {
        "backbone": canonical_backbone(backbone) if backbone else None,
        "patch_size": patch_size,
        "stride": stride,
        "level": level,
        "mpp": mpp,
        "tissue_threshold": tissue_threshold,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _completed(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of training features, completed: other toolkits' files record only a part of it."""
    known = {name: value for name, value in recorded.items() if value is not None}
    open_to_choice = {"tissue_threshold": Extraction.tissue_threshold, "dtype": Extraction.dtype}
    completed = open_to_choice | dict(given) | known
    return {"stride": completed.get("patch_size")} | completed


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
