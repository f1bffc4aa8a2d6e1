"""Predict one slide for `predict.py`, unless its files are complete: write its record and draw its pictures."""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.bags.direct_read import Fingerprint
from utils.bags.store import Bag, StoredBag
from utils.core.errors import FeatureFileError, LiteMILError, SlideError
from utils.core.files import digest, write_json
from utils.core.plots import figure_paths
from utils.core.runtime import log, versions
from utils.core.text import NOTICE
from utils.pictures.attention_map import weight_name
from utils.pictures.faithfulness_text import doubts, verdict
from utils.pictures.prediction_caption import prediction_title
from utils.pictures.settings import Pictures
from utils.prediction.annotations import Annotations
from utils.prediction.existing_records import FAITHFULNESS, clear_pictures, read_finished, request_entry, request_of
from utils.prediction.faithfulness import Faithfulness
from utils.prediction.inputs import PredictionFiles
from utils.prediction.prediction_table import SlideInfo
from utils.prediction.predictor import SlidePredictor
from utils.prediction.settings import PredictionRecipe
from utils.prediction.slide_prediction import SlidePrediction
from utils.prediction.trained_model import seen_as, seen_compared, seen_words
from utils.slides.find import is_slide_file
from utils.slides.open_slides import open_slide
from utils.slides.slide import Slide
from utils.slides.slide_mpps import SlideMpps
from utils.slides.slide_status import SlideStatus
from utils.tasks.task import FittedFigures

if TYPE_CHECKING:  # it imports what draws
    from utils.pictures.picture_set import PictureSet
    from utils.prediction.prediction_pictures import PredictionPictures


@dataclass(frozen=True)
class Predictors:
    """The predictors, and which of them predicts a slide: its index in `number_of`, or the only one."""

    each: Sequence[SlidePredictor]
    number_of: Mapping[str, int] = field(default_factory=dict)

    def number(self, slide: str) -> int:
        return self.number_of.get(slide, 0)

    def of(self, slide: str) -> SlidePredictor:
        return self.each[self.number(slide)]

    @property
    def first(self) -> SlidePredictor:
        """Return the first predictor; they share classes, data set, and whether they extract features."""
        return self.each[0]

    def folder_name(self, run: str = "") -> str:
        """Return the folder name of the models and their data sets, or of the models and a `run`: LiteMIL_mine."""
        trained = [model for predictor in self.each for model in predictor.trained]
        models = dict.fromkeys(model.checkpoint.model["name"] for model in trained)
        # Checkpoints of the first version may not record their data set.
        datasets = dict.fromkeys(model.checkpoint.dataset or model.path.absolute().parent.name for model in trained)
        return re.sub(r"[^\w.+-]+", "_", f"{'+'.join(models)}_{run or '+'.join(datasets)}").strip("._")


class LastCase:
    """The answers for the slides of the last patient, which were predicted as one bag. A pickled copy is empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: Sequence[Path] = ()
        self._answers: list[SlidePrediction] = []

    def answers(self, sources: Sequence[Path], predict: Callable[[], list[SlidePrediction]]) -> list[SlidePrediction]:
        """Return the answers for the slides with these files, in their order; predict them if they are not the last."""
        with self._lock:
            if self._sources != sources:
                self._answers, self._sources = predict(), sources
            return self._answers

    def __reduce__(self) -> tuple[type[LastCase], tuple[()]]:
        return LastCase, ()


@dataclass(frozen=True)
class SlideWorker:
    """Predicts a slide and draws its pictures, unless they exist; `infos` has patients and labels, as far as known."""

    predictors: Predictors
    files: PredictionFiles
    recipe: PredictionRecipe
    drawing: PredictionPictures | None
    infos: Mapping[str, SlideInfo]
    mpps: SlideMpps
    annotations: Annotations | None = None
    last_case: LastCase = field(default_factory=LastCase)

    def __call__(self, source: Path, target: Path) -> SlideStatus:
        started = time.perf_counter()
        request = request_of(source, self.settings_of(source.stem) | self._user_mpp(source) | self._others(source))
        earlier = None if self.files.settings.overwrite else read_finished(target, request)
        if earlier is not None and self._is_complete(earlier, source, target.parent):
            record, status, seconds = earlier, "skipped", None
        else:
            record, status = self._predict(source, target, request, earlier or {}), "done"
            seconds = round(time.perf_counter() - started, 2)
        mpp = (record["slide_record"] or {}).get("mpp_delivered")
        seen = record["seen_as"] and seen_words(record["seen_as"], record.get("seen_compared"))
        reasons = [f"the model was trained on this {seen}"] if seen else []
        if self.annotations is not None and (refusal := (record["localization"] or {}).get("reason")):
            reasons.append(f"not scored: {refusal}")
        return SlideStatus(source, status, "; ".join(reasons), record["num_instances"], mpp, seconds)

    def _predict(
        self, source: Path, target: Path, request: dict[str, Any], earlier: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the record, which keeps faithfulness and pictures of an `earlier` one of the same request, then draw
        the pictures.
        """
        settings, folder = self.files.settings, target.parent
        predictor = self.predictors.of(source.stem)
        with ExitStack() as open_files:
            scratch = open_files.enter_context(tempfile.TemporaryDirectory())
            slide = self._open(source, open_files)
            bag = self._bag(source, slide, predictor, folder if self.recipe.save_features else Path(scratch))
            size = None if self.drawing is None else self.drawing.check(slide, source, bag)
            wants_evidence = self.drawing is not None or settings.faithfulness or self.annotations is not None
            prediction = self._prediction(source, bag, predictor, wants_evidence)
            record = _with_entries_of(earlier, self._record(prediction, predictor, request))
            if wants_evidence:
                record["evidence"] = prediction.evidence_entry()
            faithfulness = self._measure_maps(record, source, prediction, predictor, slide)
            if self.drawing is not None and not self._has_same_pictures(record, source):
                record.pop("pictures", None)
            clear_pictures(target, record)
            pictures = None
            if self.drawing is not None and size is not None:
                pictures = self.drawing.pictures(slide, folder, prediction, size, record)
                record["pictures"] = self._picture_inputs(source, record) | _picture_files(pictures, folder, record)
            # Before drawing, so that a killed run leaves no pictures beside the record of another prediction.
            write_json(target, record)
            if faithfulness is not None:
                cmap = Pictures.cmap if self.drawing is None else self.drawing.cmap
                _draw_faithfulness(
                    prediction, faithfulness, record, cmap, self._faithfulness_paths(folder, source.stem)
                )
            if pictures is not None:
                pictures.write()
        return record

    def _prediction(
        self, source: Path, bag: Bag | StoredBag, predictor: SlidePredictor, wants_evidence: bool
    ) -> SlidePrediction:
        """Return the prediction of a slide; together with its patient's others, if the model predicts patients."""
        settings, sources = self.files.settings, self.files.case_of(source)

        def predict() -> list[SlidePrediction]:
            bags = {path: bag if path == source else predictor.bag(path, self.files.feat_type) for path in sources}
            return predictor.predict_bags(
                bags, settings.mode, settings.chunk_size, self._case_of(source), evidence=wants_evidence
            )

        answers = predict() if len(sources) == 1 else self.last_case.answers(sources, predict)
        return replace(answers[sources.index(source)], bag=bag)

    def _others(self, source: Path) -> dict[str, Any]:
        """Return the request's entry of the files that are answered together with a slide, if there are any."""
        sources = self.files.case_of(source)
        if len(sources) == 1:
            return {}
        files = [(path, Fingerprint.at(path)) for path in sources]
        return {"case_slides": [[path.name, file and file.size, file and file.mtime_ns] for path, file in files]}

    def _measure_maps(
        self,
        record: dict[str, Any],
        source: Path,
        prediction: SlidePrediction,
        predictor: SlidePredictor,
        slide: Slide | None,
    ) -> Faithfulness | None:
        """Add to the record how well the maps find what is annotated, and whether they matter, if wanted."""
        if self.annotations is not None:
            record["localization"] = self._localization(self.annotations, source, prediction, slide)
        if not self.files.settings.faithfulness:
            return None
        faithfulness = predictor.faithfulness(prediction) if prediction.num_instances > 1 else None
        if faithfulness is None:
            log.warning("%s: has a single patch: there is nothing to take away, and no faithfulness", source)
        record["faithfulness"] = faithfulness and faithfulness.as_dict()
        _log_faithfulness(record)
        return faithfulness

    def _open(self, source: Path, open_files: ExitStack) -> Slide | None:
        """Open the raw slide, or the slide to draw on; return None if neither is needed."""
        if is_slide_file(source):
            return open_files.enter_context(open_slide(source, self.mpps.of(source)))
        drawn_on = None if self.drawing is None else self.drawing.slide_of(source)
        return None if drawn_on is None else open_files.enter_context(open_slide(drawn_on))

    def _bag(self, source: Path, slide: Slide | None, predictor: SlidePredictor, folder: Path) -> Bag | StoredBag:
        """Return the bag. Of a raw slide, write a feature file in `folder` first, so that it can be streamed."""
        if slide is None or not is_slide_file(source):
            return predictor.bag(source, self.files.feat_type, slide)
        overwrite = self.files.settings.overwrite
        return predictor.bag(predictor.keep_features(slide, folder, overwrite), self.files.feat_type)

    def _record(
        self, prediction: SlidePrediction, predictor: SlidePredictor, request: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the content of `<slide>_prediction.json` without faithfulness and pictures.

        Raises LiteMILError for an out-of-fold slide that the fold's model was trained on.
        """
        run, slide = self.files.run, prediction.slide
        record = {"notice": NOTICE, **prediction.as_dict(), **predictor.provenance(prediction)}
        record["dataset"] = predictor.checkpoint.dataset
        if run is not None:
            fold = run.slides[slide].fold
            if prediction.seen_as != "":
                model = f"the model of fold {fold} of {run.folder}, which tests it,"
                if prediction.seen_as is None:
                    raise LiteMILError(f"{slide}: {model} does not record its training slides; train again")
                seen = seen_words(prediction.seen_as, record["seen_compared"])
                raise LiteMILError(f"{slide}: {model} was trained on this {seen}; train again, without such a leak")
            record["fold"] = fold
        return record | {"request": request_entry(request)}

    def _localization(
        self, annotations: Annotations, source: Path, prediction: SlidePrediction, slide: Slide | None
    ) -> dict[str, Any] | None:
        """Return how well the maps find what is annotated. In a folder, annotations that are refused cost the slide its
        scores, not its prediction.
        """
        try:
            return annotations.entry(source, prediction, slide)
        except (SlideError, FeatureFileError) as error:
            if self.files.settings.input is not None:
                raise
            log.warning("%s: predicted, but no map is scored: %s", source, error)
            return annotations.refusal_entry(source, error)

    def _user_mpp(self, source: Path) -> dict[str, float]:
        """Return the request's entry of the um per level-0 px that the user gives for the slide, if any."""
        mpp = self.mpps.of(source)
        return {} if mpp is None else {"told_mpp": mpp}

    def _case_of(self, source: Path) -> str | None:
        return self.infos.get(source.stem, SlideInfo()).case_id or None

    def _faithfulness_paths(self, folder: Path, slide: str) -> list[Path]:
        return figure_paths(folder / FAITHFULNESS.format(slide), self.files.settings.figure_format)

    @cached_property
    def all_settings(self) -> list[dict[str, Any]]:
        """Return the settings that change a prediction, of each predictor."""
        return [_settings_of(predictor, self.files) for predictor in self.predictors.each]

    def settings_of(self, slide: str) -> dict[str, Any]:
        return self.all_settings[self.predictors.number(slide)]

    @property
    def fitted(self) -> FittedFigures | None:
        """Return what was fitted with the model; None for several models, and for slides fed in another way."""
        settings, first = self.files.settings, self.predictors.first
        feed = first.feed(settings.mode, settings.chunk_size)
        return first.trained[0].fitted_to(feed) if len(first.trained) == 1 else None

    def _picture_inputs(self, source: Path, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the pictures of a record depend on besides its prediction."""
        assert self.drawing is not None  # noqa: S101 - for the type checker: only called where pictures are drawn
        look = self.drawing.picture_settings(source)
        inputs = {"look": look, "faithfulness": _faithfulness_digest(record.get("faithfulness"))}
        annotated = record.get("localization")
        return inputs | ({"localization": annotated["digest"]} if annotated else {})

    def _has_same_pictures(self, record: Mapping[str, Any], source: Path) -> bool:
        """Return whether the record's pictures are those that would be drawn now."""
        inputs = {name: value for name, value in (record.get("pictures") or {}).items() if name != "files"}
        inputs["faithfulness"] = _faithfulness_digest(inputs.get("faithfulness"))
        return inputs == self._picture_inputs(source, record)

    def _is_complete(self, record: Mapping[str, Any], source: Path, folder: Path) -> bool:
        """Return whether an earlier record and its files have everything that this command asks for."""
        if self.files.settings.faithfulness and "faithfulness" not in record:
            return False
        if self.annotations is not None:
            earlier = record.get("localization") or {}
            if "localization" not in record or earlier.get("digest") != self.annotations.digest_of(source):
                return False
        files = self.output_files(record, folder)
        if self.drawing is not None:
            if "evidence" not in record or not self._has_same_pictures(record, source):
                return False
            files += [folder / name for name in record["pictures"]["files"]]
        predictor = self.predictors.of(record["slide"])
        return _is_seen_alike(record, predictor, self._case_of(source)) and all(path.exists() for path in files)

    def output_files(self, record: Mapping[str, Any], folder: Path) -> list[Path]:
        """Return the files that this command makes of a slide besides its record."""
        slide = record["slide"]
        features = [folder / f"{slide}.h5"] if self.recipe.save_features else []
        pictures = self.drawing.paths(folder, record) if self.drawing else []
        is_measured = self.files.settings.faithfulness and record["faithfulness"]
        return [*features, *pictures, *(self._faithfulness_paths(folder, slide) if is_measured else [])]


def _settings_of(predictor: SlidePredictor, files: PredictionFiles) -> dict[str, Any]:
    """Return the settings that change a predictor's predictions."""
    return {
        "checkpoint": digest(*(model.path.read_bytes() for model in predictor.trained)),
        # A checkpoint of the first version leaves this to the command line.
        "num_heads": sorted({model.checkpoint.model.get("num_heads") or 0 for model in predictor.trained}),
        **predictor.task.record,
        "prevalence": files.settings.prevalence,
        "feed": predictor.feed(files.settings.mode, files.settings.chunk_size).as_dict(),
        "feat_type": files.feat_type,
        "recipe": predictor.feature_extractor and predictor.feature_extractor.recipe.as_dict(),
        "litemil": versions()["litemil"],
    }


def _with_entries_of(earlier: Mapping[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the entries of an earlier one of the same request that hold for it."""
    if earlier.get("seen_as") != record["seen_as"]:
        return record
    names = "evidence", "localization", "faithfulness", "pictures"
    return record | {name: earlier[name] for name in names if name in earlier}


def _picture_files(pictures: PictureSet, folder: Path, record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of a record's pictures: those to be drawn, and earlier ones in other formats."""
    names = [file.relative_to(folder).as_posix() for file in pictures.files]
    return {"files": list(dict.fromkeys([*names, *record.get("pictures", {}).get("files", [])]))}


def _is_seen_alike(record: Mapping[str, Any], predictor: SlidePredictor, case_id: str | None) -> bool:
    """Return whether a record of the same file and checkpoints says of training what would be said now."""
    slide, compared = record["slide"], record.get("seen_compared")
    if record["seen_as"] == "slide" and compared == "content":
        return True
    seen = seen_as(predictor.trained, slide, case_id)
    if "seen_compared" not in record:  # earlier versions compared names
        compared = seen if seen is None else "name"
    return record["seen_as"] == seen and compared == seen_compared(predictor.trained, slide, seen)


def _log_faithfulness(record: Mapping[str, Any]) -> None:
    """Log which maps the answer bears out and which it does not, or why attention has no order, if any is so."""
    measured, weights = record["faithfulness"], weight_name(record)
    if not measured:
        return
    sentences = [verdict(measured, weights), *doubts(record["predicted_class"], measured, weights)]
    for sentence in filter(None, sentences):
        log.info("%s: %s", record["slide"], sentence)


def _faithfulness_digest(faithfulness: Mapping[str, Any] | str | None) -> str | None:
    """Return the digest of a measured faithfulness; records of earlier versions hold the measurement itself."""
    if faithfulness is None or isinstance(faithfulness, str):
        return faithfulness
    return digest(json.dumps(faithfulness, sort_keys=True))


def _draw_faithfulness(
    prediction: SlidePrediction,
    faithfulness: Faithfulness,
    record: Mapping[str, Any],
    cmap: str,
    paths: Sequence[Path],
) -> None:
    # Imported here, because drawing is slow to import.
    from utils.pictures.faithfulness_figure import cropped_map, faithfulness_figure
    from utils.pictures.heatmap import save_picture

    bag, maps = prediction.bag, []
    if bag.coords is not None and bag.patch_size_level0 is not None and prediction.patch_attention is not None:
        attentions = prediction.patch_attention, faithfulness.randomised
        maps = [cropped_map(bag.coords, attention, bag.patch_size_level0) for attention in attentions]
    title, predicted_class = prediction_title(record), prediction.predicted_class
    figure = faithfulness_figure(
        record["faithfulness"], maps, cmap, title, predicted_class, weights=weight_name(record)
    )
    for path in paths:
        save_picture(figure, path)
