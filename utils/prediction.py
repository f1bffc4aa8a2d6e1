"""What `predict.py` does: slides or folders of them predicted, drawn, kept and scored."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.bags.labels import LabelRow
from utils.bags.store import Bag, StoredBag
from utils.core.config import Cluster, Pictures, Prediction, PredictionRecipe
from utils.core.device import resolve_device
from utils.core.engine import Threads, open_engine
from utils.core.errors import ConfigError
from utils.core.files import appeared, clear_parts, digest, read_json, write_json
from utils.core.runtime import log, versions
from utils.inference import SEEN, SlidePrediction, SlidePredictor, extractPredict, recipe_asked
from utils.learning.answers import (
    FAITHFULNESS,
    REPORT,
    Answers,
    PredictionFiles,
    check_first,
    clear_pictures,
    kept_answer,
    request_of,
)
from utils.learning.faithfulness import Faithfulness
from utils.pictures.caption import title_of
from utils.pictures.faithfulness import faithfulness_figure, map_of
from utils.pictures.heatmap import save_picture
from utils.slides.batch import work_through
from utils.slides.status import STATUSES, SlideStatus
from utils.slides.wsi import is_slide_file, read_slides_csv

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
        if recipe.save_features or recipe.weights or recipe.slides_csv:
            raise ConfigError(
                f"{asked.input or asked.input_dir}: holds features already; --save_features, --weights and "
                "--slides_csv go with raw slides"
            )
        predictor = SlidePredictor(asked.checkpoint, **said)
        predictor.require(recipe=recipe_asked(**cutting))
    predictor.require(mil=asked.mil, input_dim=asked.input_dim)
    if predictor.feed(asked.mode, asked.chunk_size).mode == "full" and asked.chunk_size is not None:
        raise ConfigError("--chunk_size has no meaning in full mode; give --mode chunked with it")
    return predictor


class Drawing(Protocol):
    """What draws predictions; `utils.attention_visualizer.PredictionPictures` is one."""

    @property
    def cmap(self) -> str: ...

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
    ) -> list[Path]: ...


def predict_files(
    predictor: SlidePredictor,
    files: PredictionFiles,
    recipe: PredictionRecipe,
    drawing: Drawing | None = None,
    cluster: Cluster | None = None,
) -> tuple[list[SlideStatus], str]:
    """Predict a slide or a folder of them, keep what is there, go on past a bad one.

    Each answer is a file; of a folder there are also the table, with labels the scores and their figures, and a report.
    Returns what became of each slide and a text of it. Raises for a single slide that fails.
    """
    asked, cluster = files.asked, cluster or Cluster()
    rows = files.label_rows(predictor.checkpoint.class_names, asked.dataset or predictor.checkpoint.dataset)
    work = _Work(predictor, asked, recipe, drawing, rows)
    if asked.input is not None:
        if cluster.is_asked_for:
            raise ConfigError("--ray shares a folder out; give --input_dir with it")
        target = files.targets[asked.input]
        status = work(asked.input, target)
        if seen_as := read_json(target)["seen_as"]:
            log.warning(SEEN, asked.input, seen_as)
        return [status], work.told(asked.input, target)
    if predictor.feature_extractor is not None and not cluster.is_asked_for:
        _ = predictor.feature_extractor.backbone  # one that cannot be had is no slide's fault
    clear_parts(asked.output_dir)
    if not asked.overwrite:  # another model's predictions are nobody's slide's fault
        check_first(files.targets.values(), work.settings)
    with open_engine(cluster, Threads(), str(resolve_device(asked.device))) as engine:
        statuses = work_through(files.targets, engine, work, asked.output_dir / REPORT)
    records = [read_json(appeared(files.targets[one.slide])) for one in statuses if one.status in ("done", "skipped")]
    counts = ", ".join(f"{sum(one.status == name for one in statuses)} {name}" for name in STATUSES)
    if not records:
        return statuses, counts
    answers = Answers(records, rows, predictor.checkpoint.class_names)
    told = [answers.write(asked.output_dir, work.threshold, work.settings)]
    return statuses, "\n".join(filter(None, [*told, f"{counts}; results are in {asked.output_dir}"]))


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
        told = self._told_mpp(source)
        request = request_of(source, self.settings if told is None else self.settings | {"told_mpp": told})
        earlier = None if self.asked.overwrite else kept_answer(target, request)
        if earlier is not None and self._is_complete(earlier, source):
            record, status = earlier, "skipped"
        else:
            record, status = self._answer(source, target, request, earlier or {}), "done"
        mpp, seconds = (record["slide_record"] or {}).get("mpp_delivered"), round(time.perf_counter() - started, 2)
        reason = f"the model was trained on this {record['seen_as']}" if record["seen_as"] else ""
        return SlideStatus(source, status, reason, record["num_instances"], mpp, seconds)

    def _answer(
        self, source: Path, target: Path, request: dict[str, Any], earlier: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Make and keep the record, with what an `earlier` one of the same request has beyond what is asked for now,
        and then its pictures.
        """
        predictor, asked, folder, drawing = self.predictor, self.asked, target.parent, self.drawing
        with tempfile.TemporaryDirectory() as scratch:  # so that a raw slide, too, is streamed
            kept = folder if self.recipe.save_features else Path(scratch)
            slide = None if drawing is None or is_slide_file(source) else drawing.slide_of(source)
            is_raw = is_slide_file(source)
            made = predictor.keep_features(source, kept, self._told_mpp(source)) if is_raw else source
            bag = predictor.bag(made, asked.feat_type, slide)
            size = None if drawing is None else drawing.check(source, bag)
            prediction = predictor.predict_bag(bag, source, asked.mode, asked.chunk_size, self._case_of(source))
            record = prediction.as_dict() | predictor.provenance(prediction) | {"request": request}
            if earlier.get("seen_as") == record["seen_as"]:
                record |= {name: earlier[name] for name in ("faithfulness", "pictures") if name in earlier}
            found = self._measured(source, prediction)
            if asked.faithfulness:
                record["faithfulness"] = found and found.as_dict()
            if drawing is not None:
                record.pop("pictures", None)
            clear_pictures(target, record)
            # Before the pictures: a killed run must not leave them beside another answer.
            write_json(target, record)
            if found is not None:
                self._draw_faithfulness(prediction, found, record)
            if drawing is not None and size is not None:
                assert prediction.coords is not None and prediction.attention is not None  # noqa: S101, PT018 - checked
                files = drawing.save(source, folder, prediction.coords, prediction.attention, size, record)
                names = [file.relative_to(folder).as_posix() for file in files]
                record["pictures"] = self._shown(source, record) | {"files": names}
                write_json(target, record)
        return record

    def _measured(self, source: Path, prediction: SlidePrediction) -> Faithfulness | None:
        if not self.asked.faithfulness:
            return None
        if prediction.num_instances < 2:
            log.warning("%s: has a single patch: there is nothing to take away, and no faithfulness", source)
            return None
        return self.predictor.faithfulness(prediction)

    def _told_mpp(self, source: Path) -> float | None:
        """The slide's um per level-0 px by the user's word."""
        return self._mpps.get(source.name, self._mpps.get(source.stem))

    @cached_property
    def _mpps(self) -> dict[str, float]:
        return read_slides_csv(self.recipe.slides_csv) if self.recipe.slides_csv else {}

    def _case_of(self, source: Path) -> str | None:
        row = self.rows.get(source.stem)
        return row and row.case_id

    def _draw_faithfulness(self, prediction: SlidePrediction, found: Faithfulness, record: dict[str, Any]) -> None:
        bag, maps = prediction.bag, []
        if bag.coords is not None and bag.patch_size_level0 is not None and prediction.patch_attention is not None:
            attentions = prediction.patch_attention, found.randomised
            maps = [map_of(bag.coords, attention, bag.patch_size_level0) for attention in attentions]
        cmap = Pictures.cmap if self.drawing is None else self.drawing.cmap
        figure = faithfulness_figure(record["faithfulness"], maps, cmap, title_of(record), prediction.predicted_class)
        save_picture(figure, _faithfulness_path(self.asked.output_dir, prediction.slide))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What of the command line changes an answer."""
        predictor, extractor = self.predictor, self.predictor.feature_extractor
        return {
            "checkpoint": digest(*(one.path.read_bytes() for one in predictor.trained)),
            # What a checkpoint of the first version leaves to the command line.
            "num_heads": sorted({one.checkpoint.model.get("num_heads") or 0 for one in predictor.trained}),
            "class_names": list(predictor.checkpoint.class_names),
            "feed": predictor.feed(self.asked.mode, self.asked.chunk_size).as_dict(),
            "feat_type": self.asked.feat_type,
            "recipe": extractor and extractor.recipe,
            "litemil": versions()["litemil"],
        }

    @property
    def threshold(self) -> float | None:
        """The model's own; None for several models, of which none is the one it was fitted for, and for slides fed in
        another way than those it was fitted on.
        """
        first = self.predictor.checkpoint
        is_own = self.predictor.feed(self.asked.mode, self.asked.chunk_size) == first.slide_feed
        return first.selection.get("threshold") if is_own and len(self.predictor.trained) == 1 else None

    def _shown(self, source: Path, record: Mapping[str, Any]) -> dict[str, Any]:
        """What the pictures of a record depend on, besides its answer."""
        assert self.drawing is not None  # noqa: S101 - for the type checker: asked only of what is drawn
        return {"look": self.drawing.settings(source), "faithfulness": record.get("faithfulness")}

    def _is_complete(self, record: Mapping[str, Any], source: Path) -> bool:
        """Whether nothing is asked for that an earlier run was not asked for or did not know, or that is gone."""
        folder, slide = self.asked.output_dir, record["slide"]
        wanted = [folder / f"{slide}.h5"] if self.recipe.save_features else []
        if self.asked.faithfulness:
            if "faithfulness" not in record:
                return False
            wanted += [_faithfulness_path(folder, slide)] if record["faithfulness"] else []
        if self.drawing is not None:
            drawn = dict(record.get("pictures") or {})
            wanted += [folder / name for name in drawn.pop("files", [])]
            if drawn != self._shown(source, record):
                return False
        knows_patient = record["seen_as"] == self.predictor.seen_as(slide, self._case_of(source))
        return knows_patient and all(path.exists() for path in wanted)

    def told(self, source: Path, target: Path) -> str:
        """A slide's answer, and where it is."""
        record = read_json(target)
        kept = [target.parent / f"{source.stem}.h5"] if self.recipe.save_features else []
        drawn = self.drawing.paths(target.parent, record["slide"]) if self.drawing else []
        if self.asked.faithfulness and record["faithfulness"]:
            drawn.append(_faithfulness_path(target.parent, record["slide"]))
        return "\n".join([title_of(record), *(f"  {path}" for path in [*kept, *drawn, target])])


def _faithfulness_path(folder: Path, slide: str) -> Path:
    return folder / FAITHFULNESS.format(slide)
