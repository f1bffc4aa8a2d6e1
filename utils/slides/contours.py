"""Tissue as GeoJSON polygons that QuPath draws and edits, and back: a mask's outlines, and the mask of outlines.

QuPath counts pixels from the corner of the scanned area where a slide file tells its bounds; we count from the slide's
own corner. What lies between is the offset, which our files record.
"""

import json
import uuid
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import SlideError, named
from utils.core.files import digest, read_json, write_json
from utils.core.runtime import log
from utils.slides.slide import Slide
from utils.slides.tissue import TISSUE_SETTINGS, TissueMask, judged_shape

CLASSIFICATION = {"name": "Tissue", "color": [0, 158, 115]}
# Annotations of a class with such a part are cut out: what QuPath's users call what is not to be looked at.
LEFT_OUT = ("ignore", "exclude", "artefact", "artifact", "hole")
# Rounding of coordinates in level-0 px: far below a pixel of the mask.
_DECIMALS = 2
_EAST, _SOUTH, _WEST, _NORTH = range(4)  # a right turn is the next one

Ring = NDArray[np.float64]


def write_contours(path: Path, tissue: TissueMask, slide: Slide) -> None:
    """Write the outlines of a mask as QuPath's annotations, one a piece, in QuPath's pixel frame.

    A file that somebody has edited since is left alone, and that is said.
    """
    if path.exists() and not _is_as_written(path):
        log.warning("%s: was edited since it was written, and is kept; move it, or use it with --tissue", path)
        return
    rows, columns = tissue.mask.shape
    scale = np.array([slide.width / columns, slide.height / rows])
    offset = qupath_offset(slide)
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
    """A GeoJSON file of a slide's tissue, ours or QuPath's, as it was when it was read.

    Of its areas those of the `classes` are the tissue, all where none are named; case does not matter.
    """

    path: Path
    content: Any
    classes: Collection[str] = ()

    @classmethod
    def read(cls, path: Path, classes: Collection[str] = ()) -> Self:
        """Raises SlideError where there is no JSON in it."""
        return cls(path, read_json(path, SlideError), classes)

    def is_as_detected(self, slide: Slide) -> bool:
        """Whether these are the outlines that today's detector wrote of the slide, and nobody has edited them."""
        frame = self._frame
        return (
            frame is not None
            and frame.get("digest") == _digest_of(self.content.get("features"))
            and {name: frame.get(name) for name in _detector(slide)} == _detector(slide)
            and (frame.get("slide"), frame.get("width"), frame.get("height")) == (slide.name, slide.width, slide.height)
            and not self.classes
        )

    def mask(self, slide: Slide) -> TissueMask:
        """The mask of its polygons at the resolution the tissue is judged at.

        A pixel is tissue when its middle lies in a polygon, in no hole of it, and in none of a class that is
        `LEFT_OUT`.

        Raises:
            SlideError: not GeoJSON, no polygon in it, polygons that lie beside the slide, or another slide's.
        """
        areas = _areas(self.content, self.path)
        tissue = [area for area in areas if not area.is_left_out and area.is_of(self.classes)]
        if not tissue:
            raise SlideError(f"{self.path}: {self._shortage(areas)}")
        shape = judged_shape(slide)
        to_mask = np.array([shape[1] / slide.width, shape[0] / slide.height])
        offset = self._offset(slide, tissue)
        mask, left_out = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for area in (*tissue, *(area for area in areas if area.is_left_out)):
            for polygon in area.polygons:
                rings = [(ring + offset) * to_mask for ring in polygon]
                _check_place(rings, shape, self.path, slide)
                fill(left_out if area.is_left_out else mask, rings)
        mpp = slide.mpp / to_mask.mean() if slide.mpp else None
        return TissueMask(mask & ~left_out, mpp, TISSUE_SETTINGS)

    def _shortage(self, areas: Sequence["_Area"]) -> str:
        """Why there is no tissue in it, and what to do."""
        if self.classes and areas:
            known = sorted({" ".join(area.classes) or "no class" for area in areas})
            wanted = ",".join(self.classes)
            return f"no area of --tissue_classes {wanted} in it; there are {named(known)}"
        return "no polygon in it; draw the tissue as areas, or move the file away"

    @property
    def _frame(self) -> Mapping[str, Any] | None:
        """What a file that we wrote says of its slide."""
        frame = self.content.get("litemil") if isinstance(self.content, Mapping) else None
        return frame if isinstance(frame, Mapping) else None

    def _offset(self, slide: Slide, areas: Sequence["_Area"]) -> NDArray[np.float64]:
        """What the file says of it, where it says so, and else the slide's, unless the areas lie in the slide's own
        pixels.
        """
        frame = self._frame
        if frame is None:
            return _offset_by_place(slide, areas, self.path)
        size = frame.get("width", slide.width), frame.get("height", slide.height)
        if size != (slide.width, slide.height):
            raise SlideError(
                f"{self.path}: of a slide of {size[0]} x {size[1]} px, but {slide.path} has {slide.width} x "
                f"{slide.height}; give the file of this slide"
            )
        if frame.get("slide", slide.name) != slide.name:
            log.warning("%s: says that it is of slide %s, used for %s", self.path, frame["slide"], slide.path)
        return np.array(frame.get("offset", qupath_offset(slide)), dtype=float)


def _detector(slide: Slide) -> dict[str, Any]:
    """What the detector's outlines of a slide depend on, besides its pixels."""
    return {"tissue": TISSUE_SETTINGS.as_dict(), "mpp": slide.mpp}


def _offset_by_place(slide: Slide, areas: Sequence["_Area"], path: Path) -> NDArray[np.float64]:
    """The corner of the scanned area, at which QuPath begins to count, or none where the areas lie better so: then they
    are in the slide's own pixels.
    """
    offset = qupath_offset(slide)
    if slide.bounds is None or not offset.any():
        return offset
    corners = np.concatenate([ring for area in areas for polygon in area.polygons for ring in polygon])
    low, high = corners.min(axis=0), corners.max(axis=0)
    size = np.array(slide.bounds[2:])
    within = _share_within(low, high, np.zeros(2), size)
    if within >= _share_within(low, high, offset, offset + size):
        return offset
    log.info("%s: lies beyond the scanned area when counted from its corner; taken as px of the whole slide", path)
    return np.zeros(2)


def _share_within(low: NDArray, high: NDArray, first: NDArray, last: NDArray) -> float:
    """The share of a box (low, high) that lies in another."""
    overlap = np.maximum(np.minimum(high, last) - np.maximum(low, first), 0)
    return float(np.prod(overlap) / max(np.prod(high - low), 1e-9))


def _digest_of(content: Any) -> str:
    return digest(json.dumps(content, sort_keys=True))


def _is_as_written(path: Path) -> bool:
    content = read_json(path, SlideError)
    frame = content.get("litemil") if isinstance(content, Mapping) else None
    return isinstance(frame, Mapping) and frame.get("digest") == _digest_of(content.get("features"))


def outlines(mask: NDArray[np.bool_]) -> list[list[Ring]]:
    """Of each piece of a mask (h, w), its outer ring and then its holes: corners (n, 2), x and y in px of the mask.

    Pieces that touch at a corner only are apart. Rings go along the pixels' edges, do not cross or touch themselves,
    and run with the tissue on their right hand.
    """
    from scipy import ndimage  # slow to import, and needed where a slide is read alone

    labels = np.empty(mask.shape, dtype=np.int32)
    ndimage.label(mask, output=labels)
    outer: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = {piece: [] for piece in range(1, int(labels.max(initial=0)) + 1)}
    for ring in _rings(mask):
        (x, y), (next_x, next_y) = ring[0], ring[1]
        # The pixel on the right hand of the first side.
        row = y if next_x > x else y - 1 if next_x < x else min(y, next_y)
        column = x if next_y < y else x - 1 if next_y > y else min(x, next_x)
        piece = int(labels[row, column])
        if _area(ring) > 0:
            outer[piece] = ring.astype(float)
        else:
            holes[piece].append(ring.astype(float))
    return [[outer[piece], *holes[piece]] for piece in sorted(outer)]


def fill(mask: NDArray[np.bool_], rings: Sequence[Ring]) -> None:
    """Set the pixels of a mask (h, w) whose middles lie within an odd number of the rings (n, 2), in px of the mask."""
    rows, columns = mask.shape
    crossings = np.zeros((rows, columns + 1), dtype=np.int32)
    for ring in rings:
        start, end = ring, np.roll(ring, -1, axis=0)
        low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
        first = np.clip(np.ceil(low - 0.5), 0, rows).astype(np.int64)  # rows whose middle is on the side
        last = np.clip(np.ceil(high - 0.5), 0, rows).astype(np.int64)
        counts = last - first
        side = np.repeat(np.arange(len(ring)), counts)
        row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[side]
        slope = (row + 0.5 - start[side, 1]) / (end[side, 1] - start[side, 1])
        x = start[side, 0] + slope * (end[side, 0] - start[side, 0])
        np.add.at(crossings, (row, np.clip(np.ceil(x - 0.5), 0, columns).astype(np.int64)), 1)
    mask |= (np.cumsum(crossings, axis=1)[:, :columns] & 1).astype(bool)


def _rings(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """The closed ways along the edges of a mask, as their corners (n, 2)."""
    starts, ends, headings = _sides(mask)
    width = mask.shape[1] + 1
    keys = (starts[:, 1] * width + starts[:, 0]) * 4 + headings
    order = np.argsort(keys)
    ordered = keys[order]
    corner = (ends[:, 1] * width + ends[:, 0]) * 4
    # Where two pixels touch at a corner the way turns right, round the pixel it comes from.
    right, left = (_place(ordered, corner + (headings + turn) % 4) for turn in (1, 3))
    following = order[np.where(right >= 0, right, left)]
    left_over = np.ones(len(starts), dtype=bool)
    corners = starts.tolist()
    for first in range(len(starts)):
        if not left_over[first]:
            continue
        way: list[tuple[int, int]] = []
        seen: dict[tuple[int, int], int] = {}
        side = first
        while left_over[side]:
            left_over[side] = False
            place = (corners[side][0], corners[side][1])
            if place in seen:  # the way touches itself here: what lies between is a ring of its own
                cut = seen[place]
                yield np.array(way[cut:])
                for gone in way[cut + 1 :]:
                    del seen[gone]
                del way[cut + 1 :]
            else:
                seen[place] = len(way)
                way.append(place)
            side = int(following[side])
        yield np.array(way)


def _sides(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The straight sides of a mask's edges, tissue on their right: starts (n, 2), ends (n, 2), headings (n)."""
    padded = np.pad(mask, 1).astype(np.int8)
    starts, ends, headings = [], [], []
    # Between a row and the next: 1 where tissue begins (eastward), -1 where it ends (westward); alike for columns.
    for change, along_x in ((np.diff(padded, axis=0)[:, 1:-1], True), (np.diff(padded, axis=1)[1:-1].T, False)):
        for sign in (1, -1):
            runs = np.diff(np.pad((change == sign).astype(np.int8), ((0, 0), (1, 1))), axis=1)
            line, begin = np.nonzero(runs == 1)
            _, end = np.nonzero(runs == -1)
            one, other = (begin, end) if (sign == 1) == along_x else (end, begin)
            pairs = [(one, line), (other, line)] if along_x else [(line, one), (line, other)]
            starts.append(np.stack(pairs[0], axis=1))
            ends.append(np.stack(pairs[1], axis=1))
            heading = (_EAST if sign == 1 else _WEST) if along_x else (_NORTH if sign == 1 else _SOUTH)
            headings.append(np.full(len(line), heading))
    return np.concatenate(starts), np.concatenate(ends), np.concatenate(headings)


def _place(ordered: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the keys stand in an ordered array, -1 where they do not."""
    places = np.minimum(np.searchsorted(ordered, keys), max(0, len(ordered) - 1))
    return np.where(ordered[places] == keys, places, -1) if len(ordered) else places


def _area(ring: NDArray[np.int64]) -> float:
    """Positive for an outer ring."""
    x, y = ring[:, 0].astype(float), ring[:, 1].astype(float)
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


def _closed(ring: Ring) -> NDArray[np.float64]:
    return np.round(np.concatenate([ring, ring[:1]]), _DECIMALS)


def qupath_offset(slide: Slide) -> NDArray[np.float64]:
    """(x, y) level-0 px at which QuPath begins to count: the corner of the scanned area, where the file tells it."""
    return np.array(slide.bounds[:2] if slide.bounds else (0, 0), dtype=float)


def _features(content: Any, path: Path) -> list[Mapping[str, Any]]:
    """The features of a collection, a bare list, a single feature or a bare geometry."""
    if isinstance(content, Mapping) and content.get("type") == "FeatureCollection":
        content = content.get("features")
    if isinstance(content, Mapping):
        content = [content if content.get("type") == "Feature" else {"type": "Feature", "geometry": content}]
    if not isinstance(content, list) or not all(isinstance(feature, Mapping) for feature in content):
        raise SlideError(f"{path}: not GeoJSON; expected a collection or a list of features, as QuPath exports them")
    return content


def _polygons(geometry: Any, path: Path) -> Iterator[list[Ring]]:
    """The polygons of a geometry, each a list of rings (n, 2)."""
    kind = geometry.get("type") if isinstance(geometry, Mapping) else None
    if kind == "GeometryCollection":
        for part in geometry.get("geometries", []):
            yield from _polygons(part, path)
    elif kind in ("Polygon", "MultiPolygon"):
        coordinates = geometry.get("coordinates") or []
        try:
            polygons = [
                [np.array(ring, dtype=float)[:, :2] for ring in polygon]
                for polygon in ([coordinates] if kind == "Polygon" else coordinates)
            ]
        except (TypeError, ValueError, IndexError) as error:
            raise SlideError(f"{path}: a polygon's coordinates are no list of rings of [x, y]") from error
        for rings in polygons:
            if not rings or not all(len(ring) > 2 and np.isfinite(ring).all() for ring in rings):
                raise SlideError(f"{path}: a polygon without three finite corners; draw it again")
            yield rings
    else:
        log.warning("%s: %s is no area; left out", path, kind or "an empty geometry")


@dataclass(frozen=True)
class _Area:
    """An annotation: its polygons, each a list of rings, and the parts of its class, in small letters."""

    polygons: Sequence[Sequence[Ring]]
    classes: Sequence[str]
    is_missing: bool = False

    @property
    def is_left_out(self) -> bool:
        return self.is_missing or any(part.startswith(LEFT_OUT) for part in self.classes)

    def is_of(self, classes: Collection[str]) -> bool:
        """Whether it has one of the classes, or none are named."""
        wanted = {name.strip().lower() for name in classes}
        return not wanted or bool(wanted & {*self.classes, ": ".join(self.classes)})


def _areas(content: Any, path: Path) -> list[_Area]:
    """All annotations of a file that have an area, those inside others among them. Raises SlideError."""
    areas = []
    waiting = deque((feature, False) for feature in _features(content, path))
    while waiting:
        feature, is_missing = waiting.popleft()
        properties = feature.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        # A core of a tissue microarray that is missing is empty, whatever is drawn in it.
        is_missing = is_missing or properties.get("isMissing", feature.get("isMissing")) is True
        polygons = list(_polygons(feature.get("geometry"), path))
        if polygons:
            areas.append(_Area(polygons, _class_parts(properties.get("classification")), is_missing))
        inside = [*(properties.get("childObjects") or ()), *(feature.get("childObjects") or ())]
        waiting += [(child, is_missing) for child in inside if isinstance(child, Mapping)]
    return areas


def _class_parts(classification: Any) -> list[str]:
    """The parts of a class, in small letters: QuPath tells a derived one as "Tumor: Fold", as `names`, or, of old, as a
    name with a `parentClass`.
    """
    if isinstance(classification, str):
        return [part.strip().lower() for part in classification.split(":") if part.strip()]
    if isinstance(classification, Mapping):
        return [part for key in ("parentClass", "name", "names") for part in _class_parts(classification.get(key))]
    return [part for name in classification for part in _class_parts(name)] if isinstance(classification, list) else []


def _check_place(rings: Sequence[Ring], shape: tuple[int, int], path: Path, slide: Slide) -> None:
    corners = np.concatenate(rings)
    low, high = corners.min(axis=0), corners.max(axis=0)
    if (high <= 0).any() or (low >= [shape[1], shape[0]]).any():
        size = f"{slide.width} x {slide.height} px"
        raise SlideError(f"{path}: a polygon lies beside {slide.path} of {size}; give the file of this slide")
