"""All pictures of one prediction: figures, patches, data, QuPath tiles and the report page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.core.files import whole_file
from utils.core.plots import figure_paths
from utils.core.text import NOTICE
from utils.pictures.attention_map import AttentionMap
from utils.pictures.blank_slide import BlankSlide
from utils.pictures.evidence_map import EvidenceMap, EvidenceOverlay
from utils.pictures.geojson import ZIPPED_FROM, write_attention
from utils.pictures.heatmap import (
    Figure,
    detailed_figure,
    evidence_figure,
    heatmap_figure,
    map_thumbnail,
    save_picture,
)
from utils.pictures.overlay import MapStyle, Overlay, Picture
from utils.pictures.prediction_caption import Caption, model_text, prediction_title
from utils.pictures.report_page import write_report
from utils.pictures.settings import Pictures
from utils.pictures.top_patches import (
    PatchGroup,
    PatchRecord,
    attention_groups,
    grid_figure,
    patch_files,
    patch_records,
    read_evidence_groups,
    read_extremes,
    read_patches,
    write_patches,
)
from utils.slides.slide import Slide
from utils.tasks.records import Answer

_OVERVIEW = 2000  # px of the overview's longer side
_GRID = "patch_grid"
_FIGURES = ("heatmap", "detailed", _GRID)
_EVIDENCE = "evidence"  # the figure of models that give it
_THUMBNAIL, _PATCHES, _DATA, _TILES, _PAGE = (
    "thumbnail.jpg", "top_patches", "attention.npz", "attention.geojson", "report.html",
)  # fmt: skip


def overview(slide: Slide | BlankSlide, attention: AttentionMap, mpp: float | None = None) -> Picture:
    """Return the overview of what was scanned, and of all patches; `mpp` is the slide's um per level-0 px, by default
    that of the file.
    """
    x, y, width, height = slide.scanned
    low = np.minimum(attention.coords.min(axis=0), (x, y)).clip(0)
    high = np.maximum(attention.coords.max(axis=0) + attention.size_level0, (x + width, y + height))
    right, bottom = np.minimum(high, (slide.width, slide.height)).tolist()
    left, top = low.tolist()
    area = left, top, right - left, bottom - top
    pixels, is_blank = slide.thumbnail(max_side=_OVERVIEW, area=area), isinstance(slide, BlankSlide)
    return Picture(pixels, *area[2:], mpp or slide.mpp, (left, top), is_blank)


def picture_paths(
    folder: Path,
    slide: str,
    formats: Sequence[str],
    count: int,
    *,
    evidence: bool,
    top_k: int = Pictures.top_k,
    is_blank: bool = False,
) -> list[Path]:
    """Return the paths of the pictures of a slide of `count` patches, the figures in each of the `formats` first; of
    evidence only if there is any, of patches only for a `top_k` above 0, and no grid if the slide is not at hand.
    """
    left_out = {_EVIDENCE: not evidence, _GRID: top_k == 0 or is_blank, _PATCHES: top_k == 0}
    figures = [name for name in (*_FIGURES, _EVIDENCE) if not left_out.get(name)]
    files = [name for name in (_THUMBNAIL, _PATCHES, _DATA, _tiles(count), _PAGE) if not left_out.get(name)]
    paths = [path for name in figures for path in figure_paths(folder / f"{slide}_{name}", formats)]
    return [*paths, *(folder / f"{slide}_{name}" for name in files)]


def _tiles(count: int) -> str:
    """Return the end of the name of the file with QuPath's tiles, by their number."""
    return _TILES if count < ZIPPED_FROM else f"{_TILES}.zip"


@dataclass(frozen=True, eq=False)
class PictureSet:
    """The pictures of one prediction, to be written to a folder.

    `attention` is the mean over the `heads (H, N)`. `record` is the content of `<slide>_prediction.json`. Without the
    slide, maps are drawn on white ground, and patches are not shown.
    """

    slide: Slide | BlankSlide
    folder: Path
    attention: AttentionMap
    heads: NDArray
    record: Mapping[str, Any]
    style: MapStyle
    top_k: int
    formats: Sequence[str]
    evidence: EvidenceMap | None = None

    @property
    def files(self) -> list[Path]:
        """All files that `write` writes."""
        has_evidence, patches = self.evidence is not None, self._path(_PATCHES)
        slide, count = self.record["slide"], len(self.attention)
        paths = picture_paths(
            self.folder,
            slide,
            self.formats,
            count,
            evidence=has_evidence,
            top_k=self.top_k,
            is_blank=self._pixels is None,
        )
        return [
            file
            for path in paths
            for file in (patch_files(patches, self._patch_records) if path == patches else [path])
        ]

    @cached_property
    def _patch_records(self) -> list[PatchRecord]:
        records = patch_records(self.attention, self.top_k, self.record["seen_in_training"])
        return [replace(record, file="") for record in records] if self._pixels is None else records

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.record['slide']}_{name}"

    def write(self) -> None:
        """Draw and write the files."""
        caption, record = Caption.of(self.record), self.record
        mpp = (record["slide_record"] or {}).get("mpp")
        overlay = Overlay(overview(self.slide, self.attention, mpp), self.attention, self.style)
        groups = self._patch_groups()
        about = {"prediction": caption.answer, "seen_in_training": record["seen_in_training"], "notice": NOTICE}
        by_class = {} if self.evidence is None else {
            f"Evidence {name}": self.evidence.of_class(name) for name in self.evidence.class_names
        }  # fmt: skip
        tiles = self._path(_tiles(len(self.attention)))
        write_attention(tiles, self.attention, self.slide, self.style.cmap, about, by_class, model=model_text(record))
        evidence = self._evidence_overlays(overlay.picture)
        for name, draw in self._figures(overlay, caption, groups, evidence[0] if evidence else None).items():
            figure = draw()  # one at a time, as each holds its pixels
            for path in figure_paths(self._path(name), self.formats):
                save_picture(figure, path)
        with whole_file(self._path(_THUMBNAIL)) as unfinished:
            map_thumbnail(overlay).save(unfinished, "JPEG", quality=75)
        if self.top_k:
            extremes = np.concatenate([self.attention.top(self.top_k), self.attention.lowest(self.top_k)])
            patches = () if self._pixels is None else read_patches(self._pixels, self.attention, extremes)
            write_patches(self._path(_PATCHES), self._patch_records, patches)
        self._write_data(Answer.of(record))
        write_report(self._path(_PAGE), record["slide"], overlay, caption, groups, evidence)

    def _figures(
        self, overlay: Overlay, caption: Caption, groups: Sequence[PatchGroup], evidence: EvidenceOverlay | None
    ) -> dict[str, Callable[[], Figure]]:
        """Return what draws each figure, by the end of its file's name."""
        title, top_k = prediction_title(self.record), self.top_k
        figures = {
            "heatmap": lambda: heatmap_figure(overlay, title=title, top_k=top_k),
            "detailed": lambda: captioned_figure(overlay, caption, title, top_k, evidence),
        }
        if groups and top_k:
            figures[_GRID] = lambda: grid_figure(self.attention, groups, title, overlay.picture.mpp)
        if evidence is not None:
            look = {"top_k": top_k, "alpha": self.style.alpha}
            figures[_EVIDENCE] = lambda: evidence_figure(evidence, title=title, text=caption.evidence, **look)
        return figures

    @property
    def _pixels(self) -> Slide | None:
        """Return the slide if it is at hand."""
        return None if isinstance(self.slide, BlankSlide) else self.slide

    def _patch_groups(self) -> list[PatchGroup]:
        """Read the patches to show; none if the slide is not at hand."""
        slide = self._pixels
        if slide is None:
            return []
        top, least = read_extremes(slide, self.attention, self.top_k)
        groups = attention_groups(self.attention, top, least)
        if self.evidence is not None:
            predicted = Answer.of(self.record).signal
            groups += read_evidence_groups(slide, self.attention, self.evidence, predicted, self.top_k)
        return groups

    def _evidence_overlays(self, picture: Picture) -> list[EvidenceOverlay]:
        """Return the evidence for each class over the overview, that for the predicted class first."""
        if self.evidence is None:
            return []
        predicted = Answer.of(self.record).signal
        names = sorted(self.evidence.class_names, key=lambda name: name != predicted)
        return [EvidenceOverlay(picture, self.attention, self.evidence, name) for name in names]

    def _write_data(self, answer: Answer) -> None:
        """Write the attention, also of each head `(H, N)`, the evidence `(C, N)` and the prediction as `.npz`."""
        record, attention, slide = self.record, self.attention, self.record["slide_record"] or {}
        seen, models = record["seen_in_training"], record.get("models", [])
        evidence = {} if self.evidence is None else {
            "evidence": self.evidence.contributions, answer.task.quantity_key: self.evidence.log_odds,
            f"reference_{answer.task.quantity_key}": self.evidence.reference,
        }  # fmt: skip
        with whole_file(self._path(_DATA)) as unfinished, unfinished.open("wb") as file:
            np.savez(
                file, coords=attention.coords, attention=attention.attention, attention_heads=self.heads,
                patch_size_level0=attention.size_level0,
                **{answer.task.names_key: list(answer.values)},
                **{answer.task.values_key: list(answer.values.values())}, prediction=answer.predicted,
                mpp=slide.get("mpp") or self.slide.mpp or np.nan, mpp_patches=slide.get("mpp_delivered") or np.nan,
                checkpoints=[model["checkpoint"] for model in models],
                weights_digests=[model["weights_digest"] for model in models],
                **({} if seen is None else {"seen_in_training": seen}), **evidence,
            )  # fmt: skip


def captioned_figure(
    overlay: Overlay, caption: Caption, title: str, top_k: int, evidence: EvidenceOverlay | None = None
) -> Figure:
    """Draw the detailed figure with the caption's facts and notes."""
    notes = [*caption.notes, *overlay.attention.notes]
    facts = [*caption.facts, *(("note", note) for note in notes)]
    return detailed_figure(
        overlay, title=title, top_k=top_k, probabilities=caption.probabilities, facts=facts, evidence=evidence,
        probability_title=caption.probability_title, marked=caption.marked,
    )  # fmt: skip
