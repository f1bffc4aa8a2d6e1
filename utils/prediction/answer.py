"""A slide's answer for `predict.py`: by which model, whether it is there already, its record and its pictures."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.bags.store import Bag, StoredBag
from utils.core.errors import LiteMILError
from utils.core.files import digest, write_json
from utils.core.plots import figure_paths
from utils.core.runtime import log, versions
from utils.core.text import NOTICE
from utils.pictures.caption import title_of
from utils.pictures.settings import Pictures
from utils.prediction.faithfulness import Faithfulness
from utils.prediction.inputs import PredictionFiles
from utils.prediction.predictor import SlidePredictor
from utils.prediction.records import FAITHFULNESS, clear_pictures, kept_answer, recorded, request_of
from utils.prediction.scores import Known
from utils.prediction.settings import PredictionRecipe
from utils.prediction.slide_prediction import SlidePrediction
from utils.slides.find import is_slide_file
from utils.slides.slide import Slide
from utils.slides.slide_mpps import SlideMpps
from utils.slides.status import SlideStatus
from utils.slides.wsi import open_slide

if TYPE_CHECKING:  # it imports what draws
    from utils.prediction.pictures import PredictionPictures


@dataclass(frozen=True)
class Predictors:
    """Which predictor answers for a slide: the only one, or that of its number in `number_of`."""

    each: Sequence[SlidePredictor]
    number_of: Mapping[str, int] = field(default_factory=dict)

    def number(self, slide: str) -> int:
        return self.number_of.get(slide, 0)

    def of(self, slide: str) -> SlidePredictor:
        return self.each[self.number(slide)]

    @property
    def first(self) -> SlidePredictor:
        """The predictor to ask for what they share: the classes, the data set, whether it extracts features."""
        return self.each[0]

    @property
    def folder_name(self) -> str:
        """The name of the models and of what they were trained on, as of a folder: LiteMIL_mine."""
        trained = [one for predictor in self.each for one in predictor.trained]
        models = dict.fromkeys(one.checkpoint.model["name"] for one in trained)
        # A checkpoint of the first version may not tell its data set.
        datasets = dict.fromkeys(one.checkpoint.dataset or one.path.absolute().parent.name for one in trained)
        return re.sub(r"[^\w.+-]+", "_", f"{'+'.join(models)}_{'+'.join(datasets)}").strip("._")


@dataclass(frozen=True)
class Answering:
    """Makes one slide's answer, and its pictures, unless they are there; `known` is what is known of the slides."""

    predictors: Predictors
    files: PredictionFiles
    recipe: PredictionRecipe
    drawing: PredictionPictures | None
    known: Mapping[str, Known]
    mpps: SlideMpps

    def __call__(self, source: Path, target: Path) -> SlideStatus:
        started = time.perf_counter()
        request = request_of(source, self.settings_of(source.stem) | self._told_mpp(source))
        earlier = None if self.files.asked.overwrite else kept_answer(target, request)
        if earlier is not None and self._is_complete(earlier, source, target.parent):
            record, status, seconds = earlier, "skipped", None
        else:
            record, status = self._answer(source, target, request, earlier or {}), "done"
            seconds = round(time.perf_counter() - started, 2)
        mpp = (record["slide_record"] or {}).get("mpp_delivered")
        reason = f"the model was trained on this {record['seen_as']}" if record["seen_as"] else ""
        return SlideStatus(source, status, reason, record["num_instances"], mpp, seconds)

    def _answer(
        self, source: Path, target: Path, request: dict[str, Any], earlier: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Make and keep the record, with what an `earlier` one of the same request has beyond what is asked for now,
        and then its pictures.
        """
        asked, folder = self.files.asked, target.parent
        predictor = self.predictors.of(source.stem)
        with ExitStack() as open_files:
            scratch = open_files.enter_context(tempfile.TemporaryDirectory())
            slide = self._opened(source, open_files)
            bag = self._bag(source, slide, predictor, folder if self.recipe.save_features else Path(scratch))
            size = None if self.drawing is None or slide is None else self.drawing.check(slide, source, bag)
            prediction = predictor.predict_bag(bag, source, asked.mode, asked.chunk_size, self._case_of(source))
            record = self._record(prediction, predictor, request)
            if earlier.get("seen_as") == record["seen_as"]:
                record |= {name: earlier[name] for name in ("faithfulness", "pictures") if name in earlier}
            faithfulness = self._measured(source, prediction, predictor)
            if asked.faithfulness:
                record["faithfulness"] = faithfulness and faithfulness.as_dict()
            if self.drawing is not None and not self._is_drawn_alike(record, source):
                record.pop("pictures", None)
            clear_pictures(target, record)
            pictures = None
            if self.drawing is not None and slide is not None and size is not None:
                pictures = self.drawing.pictures(slide, folder, prediction, size, record)
                names = [file.relative_to(folder).as_posix() for file in pictures.files]
                names += record.get("pictures", {}).get("files", [])  # in formats that are not asked for now
                record["pictures"] = self._shown(source, record) | {"files": list(dict.fromkeys(names))}
            # Before the pictures are drawn: a killed run must not leave them beside another answer.
            write_json(target, record)
            if faithfulness is not None:
                self._draw_faithfulness(prediction, faithfulness, record, folder)
            if pictures is not None:
                pictures.write()
        return record

    def _opened(self, source: Path, open_files: ExitStack) -> Slide | None:
        """Open the raw slide, or the one that is drawn on; None where neither is needed."""
        if is_slide_file(source):
            return open_files.enter_context(open_slide(source, self.mpps.of(source)))
        if self.drawing is None:
            return None
        return open_files.enter_context(open_slide(self.drawing.slide_of(source)))

    def _bag(self, source: Path, slide: Slide | None, predictor: SlidePredictor, folder: Path) -> Bag | StoredBag:
        """Return the bag; of a raw slide by way of a feature file in `folder`, so that it is streamed, too."""
        if slide is None or not is_slide_file(source):
            return predictor.bag(source, self.files.feat_type, slide)
        return predictor.bag(predictor.keep_features(slide, folder), self.files.feat_type)

    def _record(
        self, prediction: SlidePrediction, predictor: SlidePredictor, request: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what `<slide>_prediction.json` holds, but for faithfulness and pictures.

        Raises LiteMILError for a slide that is to be answered out of fold, and that the fold's model has seen.
        """
        run, slide = self.files.run, prediction.slide
        record = {"notice": NOTICE, **prediction.as_dict(), **predictor.provenance(prediction)}
        record["dataset"] = predictor.checkpoint.dataset
        if run is not None:
            fold = run.slides[slide].fold
            if prediction.seen_as != "":
                raise LiteMILError(
                    f"{slide}: the model of fold {fold} of {run.folder}, which tests it, was trained on this "
                    f"{prediction.seen_as or 'or not, which it does not tell'}; train again, without such a leak"
                )
            record["fold"] = fold
        return record | {"request": recorded(request)}

    def _measured(self, source: Path, prediction: SlidePrediction, predictor: SlidePredictor) -> Faithfulness | None:
        if not self.files.asked.faithfulness:
            return None
        if prediction.num_instances < 2:
            log.warning("%s: has a single patch: there is nothing to take away, and no faithfulness", source)
            return None
        return predictor.faithfulness(prediction)

    def _told_mpp(self, source: Path) -> dict[str, float]:
        """The slide's um per level-0 px by the user's word, as a part of the request."""
        mpp = self.mpps.of(source)
        return {} if mpp is None else {"told_mpp": mpp}

    def _case_of(self, source: Path) -> str | None:
        return self.known.get(source.stem, Known()).case_id or None

    def _draw_faithfulness(
        self, prediction: SlidePrediction, found: Faithfulness, record: dict[str, Any], folder: Path
    ) -> None:
        # What draws is imported where something is drawn.
        from utils.pictures.faithfulness import faithfulness_figure, map_of
        from utils.pictures.heatmap import save_picture

        bag, maps = prediction.bag, []
        if bag.coords is not None and bag.patch_size_level0 is not None and prediction.patch_attention is not None:
            attentions = prediction.patch_attention, found.randomised
            maps = [map_of(bag.coords, attention, bag.patch_size_level0) for attention in attentions]
        cmap = Pictures.cmap if self.drawing is None else self.drawing.cmap
        figure = faithfulness_figure(record["faithfulness"], maps, cmap, title_of(record), prediction.predicted_class)
        for path in self._faithfulness_paths(folder, prediction.slide):
            save_picture(figure, path)

    def _faithfulness_paths(self, folder: Path, slide: str) -> list[Path]:
        return figure_paths(folder / FAITHFULNESS.format(slide), self.files.asked.figure_format)

    @cached_property
    def settings(self) -> list[dict[str, Any]]:
        """Of each predictor, what of the command line changes an answer."""
        asked = self.files.asked
        return [
            {
                "checkpoint": digest(*(one.path.read_bytes() for one in predictor.trained)),
                # What a checkpoint of the first version leaves to the command line.
                "num_heads": sorted({one.checkpoint.model.get("num_heads") or 0 for one in predictor.trained}),
                "class_names": list(predictor.checkpoint.class_names),
                "feed": predictor.feed(asked.mode, asked.chunk_size).as_dict(),
                "feat_type": self.files.feat_type,
                "recipe": predictor.feature_extractor and predictor.feature_extractor.recipe.as_dict(),
                "litemil": versions()["litemil"],
            }
            for predictor in self.predictors.each
        ]

    def settings_of(self, slide: str) -> dict[str, Any]:
        return self.settings[self.predictors.number(slide)]

    @property
    def threshold(self) -> float | None:
        """The model's own; None for several models, of which none is the one it was fitted for, and for slides fed in
        another way than those it was fitted on.
        """
        asked, first = self.files.asked, self.predictors.first
        is_own = first.feed(asked.mode, asked.chunk_size) == first.checkpoint.slide_feed
        return first.checkpoint.selection.get("threshold") if is_own and len(first.trained) == 1 else None

    def _shown(self, source: Path, record: Mapping[str, Any]) -> dict[str, Any]:
        """What the pictures of a record depend on, besides its answer."""
        assert self.drawing is not None  # noqa: S101 - for the type checker: asked only of what is drawn
        return {"look": self.drawing.settings(source), "faithfulness": _mark(record.get("faithfulness"))}

    def _is_drawn_alike(self, record: Mapping[str, Any], source: Path) -> bool:
        """Whether the pictures that a record names show what pictures drawn now would."""
        drawn = {name: value for name, value in (record.get("pictures") or {}).items() if name != "files"}
        return drawn | {"faithfulness": _mark(drawn.get("faithfulness"))} == self._shown(source, record)

    def _is_complete(self, record: Mapping[str, Any], source: Path, folder: Path) -> bool:
        """Whether nothing is asked for that an earlier run was not asked for or did not know, or that is gone."""
        slide = record["slide"]
        wanted = [folder / f"{slide}.h5"] if self.recipe.save_features else []
        if self.files.asked.faithfulness:
            if "faithfulness" not in record:
                return False
            wanted += self._faithfulness_paths(folder, slide) if record["faithfulness"] else []
        if self.drawing is not None:
            if not self._is_drawn_alike(record, source):
                return False
            wanted += [folder / name for name in record["pictures"]["files"]] + self.drawing.paths(folder, slide)
        knows_patient = record["seen_as"] == self.predictors.of(slide).seen_as(slide, self._case_of(source))
        return knows_patient and all(path.exists() for path in wanted)

    def made_files(self, record: Mapping[str, Any], folder: Path) -> list[Path]:
        """Where what was asked for of a slide is, besides its record."""
        slide = record["slide"]
        kept = [folder / f"{slide}.h5"] if self.recipe.save_features else []
        drawn = self.drawing.paths(folder, slide) if self.drawing else []
        measured = self.files.asked.faithfulness and record["faithfulness"]
        return [*kept, *drawn, *(self._faithfulness_paths(folder, slide) if measured else [])]


def _mark(faithfulness: Mapping[str, Any] | str | None) -> str | None:
    """Return what tells a measured faithfulness from another; records of before hold it all."""
    if faithfulness is None or isinstance(faithfulness, str):
        return faithfulness
    return digest(json.dumps(faithfulness, sort_keys=True))
