"""Write a tissue mask as GeoJSON polygons that QuPath shows and edits, and read the mask of such polygons.

QuPath counts pixels from the corner of the scanned area, if the slide's file has its bounds; we count from the slide's
own corner. Our files record the offset between the two (see `utils.slides.outline_origin`).
"""

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import SlideError
from utils.core.files import digest, read_json, write_json
from utils.core.runtime import log
from utils.slides.outline_origin import check_position, find_offset, qupath_offset
from utils.slides.outlines import Ring, fill, outlines
from utils.slides.qupath import Area, read_areas, shortage_of, tissue_areas
from utils.slides.slide import Slide
from utils.slides.tissue import TISSUE_SETTINGS, TissueMask, mask_shape

CLASSIFICATION = {"name": "Tissue", "color": [0, 158, 115]}
# Rounding of coordinates in level-0 px: far below a pixel of the mask.
_DECIMALS = 2


def write_contours(path: Path, tissue: TissueMask, slide: Slide) -> None:
    """Write the outlines of a mask as QuPath annotations, one per piece, in QuPath's pixel frame.

    A file that was edited after it was written is not replaced; a warning says so.
    """
    if path.exists() and not _is_as_written(path):
        log.warning("%s: was edited since it was written, and is kept; move it, or use it with --tissue", path)
        return
    rows, columns = tissue.mask.shape
    scale = np.array([slide.width / columns, slide.height / rows])
    offset = qupath_offset(slide.bounds)
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{slide.name}/{number}")),
            "geometry": {
                "type": "Polygon",
                "coordinates": [_closed(ring * scale - offset).tolist() for ring in polygon],
            },
            "properties": {"objectType": "annotation", "classification": CLASSIFICATION},
        }
        for number, polygon in enumerate(outlines(tissue.mask))
    ]
    frame = {
        "slide": slide.name, "offset": offset.tolist(), "width": slide.width, "height": slide.height,
        "digest": _digest_of(features), **_detector(slide),
    }  # fmt: skip
    write_json(path, {"type": "FeatureCollection", "features": features, "litemil": frame})


@dataclass(frozen=True)
class ContourFile:
    """The content of a GeoJSON file of a slide's tissue, written by us or by QuPath.

    If `classes` are given, in any case, only their areas are tissue.
    """

    path: Path
    content: Any
    classes: Collection[str] = ()

    @classmethod
    def read(cls, path: Path, classes: Collection[str] = ()) -> Self:
        """Read the file. Raises SlideError if it is not JSON."""
        return cls(path, read_json(path, SlideError), classes)

    def is_as_detected(self, slide: Slide) -> bool:
        """Return whether the present detector wrote the file for this slide, by its record, and nobody edited it."""
        frame = self._frame
        return (
            frame is not None
            and frame.get("digest") == _digest_of(self.content.get("features"))
            and {name: frame.get(name) for name in _detector(slide)} == _detector(slide)
            and (frame.get("slide"), frame.get("width"), frame.get("height")) == (slide.name, slide.width, slide.height)
            and not self.classes
        )

    def mask(self, slide: Slide) -> TissueMask:
        """Return the mask of its polygons at the resolution of the tissue detector.

        A pixel is tissue if its centre lies in an area of tissue, not in a hole of it, and not in an area to cut out;
        see `utils.slides.qupath`.

        Raises:
            SlideError: the file is not GeoJSON, has no tissue or is another slide's; polygons lie beside the slide or
                the scanned area, or contradict each other.
        """
        areas = read_areas(self.content, self.path)
        tissue = tissue_areas(areas, self.classes)
        if not tissue:
            raise SlideError(f"{self.path}: {shortage_of(areas, self.classes)}")
        cut_out = [area for area in areas if area.is_cut_out(self.classes)]
        offset = self.origin(slide, tissue, cut_out)
        check_position(slide, tissue, cut_out, offset, self.path)
        shape = mask_shape(slide)
        to_mask = np.array([shape[1] / slide.width, shape[0] / slide.height])
        masks = []
        for group in (tissue, cut_out):
            mask = np.zeros(shape, dtype=bool)
            for polygon in (polygon for area in group for polygon in area.polygons):
                fill(mask, [(ring + offset) * to_mask for ring in polygon])
            masks.append(mask)
        mpp = slide.mpp / to_mask.mean() if slide.mpp else None
        return TissueMask(masks[0] & ~masks[1], mpp, TISSUE_SETTINGS)

    @property
    def _frame(self) -> Mapping[str, Any] | None:
        """Return the record of the slide in a file that we wrote, or None."""
        frame = self.content.get("litemil") if isinstance(self.content, Mapping) else None
        return frame if isinstance(frame, Mapping) else None

    def origin(self, slide: Slide | None, areas: Sequence[Area], cut_out: Sequence[Area]) -> NDArray[np.float64]:
        """Return the origin (x, y) of its polygons in level-0 px, as recorded, or as their positions show.

        Without a slide, a file that records no origin counts from the slide's own corner.
        """
        frame = self._frame
        if slide is None:
            return np.array((frame or {}).get("offset", (0, 0)), dtype=float)
        if frame is None:
            return find_offset(slide, areas, cut_out, self.path)
        size = frame.get("width", slide.width), frame.get("height", slide.height)
        if size != (slide.width, slide.height):
            raise SlideError(
                f"{self.path}: of a slide of {size[0]} x {size[1]} px, but {slide.path} has {slide.width} x "
                f"{slide.height}; give the file of this slide"
            )
        if frame.get("slide", slide.name) != slide.name:
            log.warning("%s: says that it is of slide %s, used for %s", self.path, frame["slide"], slide.path)
        return np.array(frame.get("offset", qupath_offset(slide.bounds)), dtype=float)


def _detector(slide: Slide) -> dict[str, Any]:
    """Return the settings that, with its pixels, determine the detector's outlines of a slide."""
    return {"tissue": TISSUE_SETTINGS.as_dict(), "mpp": slide.mpp}


def _digest_of(content: Any) -> str:
    return digest(json.dumps(content, sort_keys=True))


def _is_as_written(path: Path) -> bool:
    content = read_json(path, SlideError)
    frame = content.get("litemil") if isinstance(content, Mapping) else None
    return isinstance(frame, Mapping) and frame.get("digest") == _digest_of(content.get("features"))


def _closed(ring: Ring) -> NDArray[np.float64]:
    return np.round(np.concatenate([ring, ring[:1]]), _DECIMALS)
