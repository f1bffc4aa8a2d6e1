"""What `predict.py` does: slides or folders of them predicted, drawn, kept and scored."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.bags.labels import LabelRow
from utils.bags.store import Bag, StoredBag
from utils.core.config import Pictures, Prediction, PredictionRecipe
from utils.core.errors import ConfigError
from utils.core.files import clear_parts, digest, read_json, write_json
from utils.core.runtime import log, versions
from utils.inference import SEEN, SlidePrediction, SlidePredictor, extractPredict, recipe_asked
from utils.learning.answers import REPORT, Answers, PredictionFiles, kept_answer, request_of
from utils.learning.faithfulness import Faithfulness
from utils.pictures.faithfulness import faithfulness_figure, map_of
from utils.pictures.heatmap import save_picture
from utils.slides.batch import STATUSES, SlideStatus, work_through
from utils.slides.wsi import is_slide_file

_CUTTING = ("backbone", "patch_size", "stride", "level", "mpp", "tissue_threshold")


def make_predictor(asked: Prediction, recipe: PredictionRecipe, are_raw: bool) -> SlidePredictor:
    """The predictor `predict.py` is asked for, with a feature extractor where the inputs are raw slides.

    Raises ConfigError for settings that go with raw slides only, and what SlidePredictor and extractPredict raise.
    """
    cutting: dict[str, Any] = {name: getattr(recipe, name) for name in _CUTTING}
    said: dict[str, Any] = {name: getattr(asked, name) for name in ("device", "dataset", "num_heads", "allow_mismatch")}
    if are_raw:
        predictor = extractPredict(
            asked.checkpoint, **cutting, **said, weights=recipe.weights, batch_size=recipe.batch_size
        )
    else:
        if recipe.save_features or recipe.weights:
            raise ConfigError(
                f"{asked.input or asked.input_dir}: holds features already; --save_features and --weights go with raw "
                "slides"
            )
        predictor = SlidePredictor(asked.checkpoint, **said)
        predictor.require(recipe=recipe_asked(**cutting))
    predictor.require(mil=asked.mil, input_dim=asked.input_dim)
    _ = predictor.feed(asked.mode, asked.chunk_size)
    return predictor


class Drawing(Protocol):
    """What draws predictions; `utils.attention_visualizer.PredictionPictures` is one."""

    def settings(self, source: Path) -> dict[str, Any]: ...

    def slide_of(self, source: Path) -> Path: ...

    def check(self, source: Path, bag: Bag | StoredBag) -> int: ...

    def paths(self, folder: Path, name: str) -> list[Path]: ...

    def save(
        self,
        source: Path,
        folder: Path,
        coords: NDArray[np.int64],
        attention: NDArray,
        size_level0: int,
        record: Mapping[str, Any],
    ) -> None: ...


def predict_files(
    predictor: SlidePredictor,
    files: PredictionFiles,
    recipe: PredictionRecipe,
    drawing: Drawing | None = None,
) -> tuple[list[SlideStatus], str]:
    """Predict a slide or a folder of them, keep what is there, go on past a bad one.

    Each answer is a file; of a folder there are also the table, with labels the scores and their figures, and a report.
    Returns what became of each slide and a text of it. Raises for a single slide that fails.
    """
    asked = files.asked
    rows = files.label_rows(predictor.checkpoint.class_names, asked.dataset or predictor.checkpoint.dataset)
    work = _Work(predictor, asked, recipe, drawing, rows)
    if asked.input is not None:
        target = files.targets[asked.input]
        status = work(asked.input, target)
        if seen_as := read_json(target)["seen_as"]:
            log.warning(SEEN, asked.input, seen_as)
        return [status], work.told(asked.input, target)
    if predictor.feature_extractor is not None:
        _ = predictor.feature_extractor.backbone  # one that cannot be had is no slide's fault
    clear_parts(asked.output_dir)
    there = [target for target in files.targets.values() if target.exists()]
    if there and not asked.overwrite:
        kept_answer(there[0], work.settings)  # another model's predictions are nobody's slide's fault
    statuses = work_through(files.targets, [work], asked.output_dir / REPORT, Event())
    records = [read_json(files.targets[one.slide]) for one in statuses if one.status in ("done", "skipped")]
    counts = ", ".join(f"{sum(one.status == name for one in statuses)} {name}" for name in STATUSES)
    if not records:
        return statuses, counts
    # Of several models none is the one that a threshold was fitted for.
    alone = predictor.checkpoint.selection.get("threshold") if len(predictor.trained) == 1 else None
    answers = Answers(records, rows, predictor.checkpoint.class_names)
    told = [answers.write(asked.output_dir, alone), f"{counts}; results are in {asked.output_dir}"]
    return statuses, "\n".join(filter(None, told))


@dataclass(frozen=True)
class _Work:
    """Makes one slide's answer, and its pictures, unless they are there."""

    predictor: SlidePredictor
    asked: Prediction
    recipe: PredictionRecipe
    drawing: Drawing | None
    rows: Mapping[str, LabelRow]

    def __call__(self, source: Path, target: Path) -> SlideStatus:
        started = time.perf_counter()
        request = request_of(source, self.settings)
        earlier = None if self.asked.overwrite else kept_answer(target, request)
        if earlier is not None and self._is_complete(earlier, source):
            record, status = earlier, "skipped"
        else:
            record, status = self._answer(source, target, request, earlier or {}), "done"
            write_json(target, record)
        mpp, seconds = (record["slide_record"] or {}).get("mpp_delivered"), round(time.perf_counter() - started, 2)
        return SlideStatus(source, status, "", record["num_instances"], mpp, seconds)

    def _answer(
        self, source: Path, target: Path, request: dict[str, Any], earlier: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The record, with what an `earlier` one of the same request has beyond what is asked for now."""
        predictor, asked, folder, drawing = self.predictor, self.asked, target.parent, self.drawing
        slide = None if drawing is None or is_slide_file(source) else drawing.slide_of(source)
        made = predictor.keep_features(source, folder) if self.recipe.save_features else source
        bag = predictor.bag(made, asked.feat_type, slide)
        size = None if drawing is None else drawing.check(source, bag)
        prediction = predictor.predict_bag(bag, source, asked.mode, asked.chunk_size, self._case_of(source))
        record = prediction.as_dict() | predictor.provenance(prediction) | {"request": request}
        record |= {name: earlier[name] for name in ("faithfulness", "pictures") if name in earlier}
        if asked.faithfulness:
            found = predictor.faithfulness(prediction)
            record["faithfulness"] = found.as_dict()
            self._draw_faithfulness(prediction, found, record)
        if drawing is not None and size is not None:
            assert prediction.coords is not None and prediction.attention is not None  # noqa: S101, PT018 - checked
            drawing.save(source, folder, prediction.coords, prediction.attention, size, record)
            record["pictures"] = drawing.settings(source)
        return record

    def _case_of(self, source: Path) -> str | None:
        row = self.rows.get(source.stem)
        return row and row.case_id

    def _draw_faithfulness(self, prediction: SlidePrediction, found: Faithfulness, record: dict[str, Any]) -> None:
        bag, maps = prediction.bag, []
        if bag.coords is not None and bag.patch_size_level0 is not None and prediction.patch_attention is not None:
            attentions = prediction.patch_attention, found.randomised
            maps = [map_of(bag.coords, attention, bag.patch_size_level0) for attention in attentions]
        title = f"{prediction.slide}: {prediction.predicted_class} ({prediction.confidence:.1%})"
        figure = faithfulness_figure(record["faithfulness"], maps, Pictures.cmap, title, prediction.predicted_class)
        save_picture(figure, _faithfulness_path(self.asked.output_dir, prediction.slide))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What of the command line changes an answer."""
        return {
            "checkpoint": digest(*(one.path.read_bytes() for one in self.predictor.trained)),
            "feed": self.predictor.feed(self.asked.mode, self.asked.chunk_size).as_dict(),
            "feat_type": self.asked.feat_type,
            "litemil": versions()["litemil"],
            **recipe_asked(**{name: getattr(self.recipe, name) for name in _CUTTING}),
        }

    def _is_complete(self, record: Mapping[str, Any], source: Path) -> bool:
        """Whether nothing is asked for that an earlier run was not asked for or did not know, or that is gone."""
        folder, slide = self.asked.output_dir, record["slide"]
        wanted = []
        if self.asked.faithfulness:
            wanted = [_faithfulness_path(folder, slide)]
            if "faithfulness" not in record:
                return False
        if self.drawing is not None:
            wanted += self.drawing.paths(folder, slide)
            if record.get("pictures") != self.drawing.settings(source):
                return False
        knows_patient = record["seen_as"] == self.predictor.seen_as(slide, self._case_of(source))
        return knows_patient and all(path.exists() for path in wanted)

    def told(self, source: Path, target: Path) -> str:
        """A slide's answer, and where it is."""
        record = read_json(target)
        kept = [target.parent / f"{source.stem}.h5"] if self.recipe.save_features else []
        drawn = self.drawing.paths(target.parent, record["slide"]) if self.drawing else []
        if self.asked.faithfulness:
            drawn.append(_faithfulness_path(target.parent, record["slide"]))
        lines = [f"{record['slide']}: {record['predicted_class']} ({record['confidence']:.1%})"]
        return "\n".join([*lines, *(f"  {path}" for path in [*kept, *drawn, target])])


def _faithfulness_path(folder: Path, slide: str) -> Path:
    return folder / f"{slide}_faithfulness.png"
