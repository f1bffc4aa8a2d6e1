"""The annotations that maps are scored against: areas drawn in QuPath, or labels of patches in the feature files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.bags.instance_labels import NAME as INST_LABELS
from utils.bags.instance_labels import read_instance_labels
from utils.core.errors import ConfigError, FeatureFileError, LiteMILError, SlideError, did_you_mean, did_you_mean_path
from utils.core.files import digest
from utils.core.runtime import log
from utils.evaluation.localization import map_scores
from utils.pictures.slide_match import patch_edge
from utils.prediction.settings import PredictionRecipe
from utils.prediction.slide_prediction import SlidePrediction
from utils.slides.annotated_patches import annotated_patches
from utils.slides.find import is_slide_file
from utils.slides.outline_folder import OutlineFolder
from utils.slides.slide import Slide
from utils.tasks.task import Task


@dataclass(frozen=True)
class _Truth:
    """Which patches are of each class, `(N,)` bool by class, and which are scored, `(N,)` bool."""

    inside: Mapping[str, NDArray[np.bool_]]
    is_scored: NDArray[np.bool_]


class Annotations:
    """Which patches of a slide show which class, by `--annotations`: a file or a folder of QuPath's areas, or
    "inst_labels", the labels in the feature files.

    `words` maps the names of areas' classes, or the numbers of `inst_labels`, to classes of the model, or to the other
    signals of its `task`; by default an area's class has the name of the model's, and 1 is the task's `main_signal`.
    Raises ConfigError.
    """

    def __init__(
        self,
        source: Path,
        words: Sequence[str],
        task: Task,
        recipe: PredictionRecipe,
        *,
        feat_type: str,
        is_folder: bool,
    ) -> None:
        self.source, self.recipe, self.classes, self.feat_type = source, recipe, task.signal_names, feat_type
        self._main = task.main_signal  # what 1 stands for
        self._words = dict(_pair(word, self.classes) for word in words)
        self.uses_labels = str(source) == INST_LABELS
        self._folder: OutlineFolder | None = None
        if self.uses_labels:
            self._check_numbers()
        elif source.is_dir() or is_folder:
            if source.is_file():
                raise ConfigError(f"--annotations {source}: a file of one slide; give the folder of the slides' files")
            self._folder = OutlineFolder(source, flag="--annotations")
        elif not source.is_file():
            near = did_you_mean_path(source)
            raise ConfigError(f"--annotations {source}: no such file or folder, nor {INST_LABELS}{near}")

    def file_of(self, source: Path) -> Path | None:
        """Return the file with a slide's annotations, or None. Raises SlideError if there are two."""
        if self.uses_labels:
            return source
        return self.source if self._folder is None else self._folder.file_of(source, Path())

    def refusal_entry(self, source: Path, error: LiteMILError) -> dict[str, Any]:
        """Return the `localization` of a slide whose annotations are refused: no scores, and the `reason`."""
        return {"annotations": str(self.source), "digest": self.digest_of(source), "classes": {}, "reason": str(error)}

    def digest_of(self, source: Path) -> str | None:
        """Return the digest of a slide's annotations and of what they stand for; None if it has none, or if they cannot
        be read.
        """
        try:
            return self._digest_of(source)
        except (SlideError, FeatureFileError):
            return None

    def _digest_of(self, source: Path) -> str | None:
        path = self.file_of(source)
        if path is None:
            return None
        content = self._labels_of(path).tobytes() if self.uses_labels else path.read_bytes()
        return digest(content, *(f"{name}={self._words[name]}" for name in sorted(self._words)))

    def entry(self, source: Path, prediction: SlidePrediction, slide: Slide | None) -> dict[str, Any] | None:
        """Return the `localization` of a slide's record: how well attention and evidence find what is annotated; None
        if nothing is annotated on it.
        """
        path = self.file_of(source)
        if path is None:
            return None
        truth = self._labelled(path) if self.uses_labels else self._drawn(path, source, prediction, slide)
        scored = truth.is_scored
        classes = {}
        for name, is_inside in truth.inside.items():
            maps = {"attention": prediction.patch_attention, "evidence": _evidence_of(prediction, name)}
            classes[name] = {"patches": int(is_inside[scored].sum()), "of": int(scored.sum())} | {
                kind: map_scores(values[scored], is_inside[scored])
                for kind, values in maps.items()
                if values is not None
            }
        return {"annotations": str(path), "digest": self.digest_of(source), "classes": classes}

    def log_unused(self, sources: Iterable[Path]) -> None:
        """Warn of files that match no slide."""
        if self._folder is not None:
            self._folder.log_unused((source, Path()) for source in sources)

    def _drawn(self, path: Path, source: Path, prediction: SlidePrediction, slide: Slide | None) -> _Truth:
        bag = prediction.bag
        if bag.coords is None:
            raise FeatureFileError(f"{source}: has no coordinates, so no patch can be found in {path}")
        edge = patch_edge(slide, source, bag, self.recipe.patch_size, self.recipe.level)
        words = {name: name for name in self.classes} | self._words
        inside, is_ignored = annotated_patches(path, words, bag.coords, edge, slide)
        return _Truth(inside, ~is_ignored)

    def _labels_of(self, path: Path) -> NDArray[np.int64]:
        """Return the labels `(N,)` of a feature file's patches."""
        if is_slide_file(path):
            raise ConfigError(
                f"--annotations {INST_LABELS}: {path} is a slide; give feature files, which may hold them"
            )
        return read_instance_labels(path, self.feat_type)

    def _labelled(self, path: Path) -> _Truth:
        labels = self._labels_of(path)
        numbers = {int(name): cls for name, cls in self._words.items()} or {1: str(self._main)}
        if not self._words:
            log.info("%s: %s 1 is taken as %s; --annotation_class 1=CLASS names another", path, INST_LABELS, numbers[1])
        unknown = sorted(set(labels[labels > 0].tolist()) - numbers.keys())
        if unknown:
            raise FeatureFileError(
                f"{path}: {INST_LABELS} {unknown[0]}: which class is it? Give --annotation_class {unknown[0]}=CLASS"
            )
        inside = {
            name: np.isin(labels, [number for number, cls in numbers.items() if cls == name])
            for name in dict.fromkeys(numbers.values())
        }
        return _Truth(inside, labels >= 0)

    def _check_numbers(self) -> None:
        for name in self._words:
            if not name.isdigit():
                raise ConfigError(f"--annotation_class {name}={self._words[name]}: {INST_LABELS} are numbers: 1=CLASS")
        if not self._words and self._main is None:
            raise ConfigError(
                f"--annotations {INST_LABELS}: which of {', '.join(self.classes)} do its numbers stand for? Give "
                f"--annotation_class 1={self.classes[-1]}"
            )


def _pair(word: str, classes: Sequence[str]) -> tuple[str, str]:
    """Return a word of `--annotation_class`, NAME=CLASS, as its two parts."""
    name, sign, cls = word.rpartition("=")
    if not sign or not name.strip():
        raise ConfigError(f"--annotation_class {word}: expected NAME=CLASS, such as Tumor={classes[-1]}")
    if cls not in classes:
        near = did_you_mean(cls, classes)
        raise ConfigError(f"--annotation_class {word}: {cls} is no class of the model ({', '.join(classes)}){near}")
    return name.strip(), cls


def _evidence_of(prediction: SlidePrediction, name: str) -> NDArray | None:
    """Return the evidence `(N,)` for a class, if there is any."""
    if prediction.evidence is None:
        return None
    return prediction.evidence.contributions[prediction.task.signal_names.index(name)]
