"""Read the areas drawn in QuPath from its GeoJSON, in all its variants, and decide which of them are tissue."""

import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import SlideError, first_few
from utils.core.runtime import log
from utils.slides.outlines import Ring, is_inside

# Areas are cut out if a part of their class begins with one of these words, with which QuPath's users exclude areas.
CUT_OUT = ("ignore", "exclude", "artefact", "artifact", "hole")
# QuPath ignores classes with this ending, so they are cut out too, except Region*, which only holds other areas.
_IGNORED_MARK, _REGION = "*", "region*"
_CORE_TYPES = frozenset({"tmacore", "tmacoreobject", "pathtmacoreobject"})
_DRAWN_TYPES = frozenset({"", "annotation", "pathannotationobject"})


@dataclass(frozen=True)
class Area:
    """An area of a file: its polygons, each a list of rings, and the parts of its class as written.

    Attributes:
        is_missing: whether it is a missing core of a tissue microarray, or lies in one.
        is_drawn: whether it is an annotation, not a core or a detected cell.
        core: the number, among the file's areas, of the core that it belongs to, or None.
    """

    polygons: Sequence[Sequence[Ring]]
    classes: Sequence[str]
    is_missing: bool = False
    is_core: bool = False
    is_drawn: bool = True
    core: int | None = None

    @property
    def class_name(self) -> str:
        """The class as QuPath shows it, and as `--tissue_classes` takes it."""
        return ": ".join(self.classes) or ("a missing core" if self.is_missing else "no class")

    def is_cut_out(self, tissue_classes: Collection[str]) -> bool:
        """Return whether it is cut out of the tissue; words in the names of `tissue_classes` are never a reason."""
        tissue_words = {word for name in tissue_classes for word in class_key(name)}
        return self.is_missing or any(_is_ignored(word) and word not in tissue_words for word in self._key)

    def is_tissue(self, tissue_classes: Collection[str]) -> bool:
        """Return whether it belongs to one of `tissue_classes`; without any, to any class but QuPath's Region*."""
        if self.is_cut_out(tissue_classes):
            return False
        if not tissue_classes:
            return not self._key or not all(word == _REGION for word in self._key)
        return any(set(class_key(name)) <= set(self._key) for name in tissue_classes if class_key(name))

    @property
    def _key(self) -> list[str]:
        return [word.lower() for word in self.classes]


def class_key(name: str) -> list[str]:
    """Return the words of a class's name in lower case: "Tumor:Positive" and "tumor: positive" are the same class."""
    return [word.lower() for word in _class_words(name)]


def read_areas(content: Any, path: Path) -> list[Area]:
    """Read all objects of a file that have an area, nested ones too. Raises SlideError."""
    areas: list[Area] = []
    waiting: deque[tuple[Mapping[str, Any], bool, int | None]] = deque()
    waiting += [(feature, False, None) for feature in _features(content, path)]
    while waiting:
        feature, is_missing, core = waiting.popleft()
        properties = feature.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        mark, kind = _missing_mark(feature, properties), _object_type(feature, properties)
        is_missing = is_missing or mark is True
        is_core = kind in _CORE_TYPES or (mark is not None and core is None)
        polygons = list(_polygons(feature.get("geometry"), path))
        if polygons:
            is_drawn = kind in _DRAWN_TYPES and not is_core
            classes = _class_words(properties.get("classification"))
            areas.append(Area(polygons, classes, is_missing, is_core, is_drawn, core))
        below = len(areas) - 1 if is_core and polygons else core
        inside = [*_children(properties), *_children(feature)]
        waiting += [(child, is_missing, below) for child in inside]
    return areas


def tissue_areas(areas: Sequence[Area], tissue_classes: Collection[str]) -> list[Area]:
    """Return the areas that are tissue; tissue drawn in a core replaces the core itself."""
    tissue = {number: area for number, area in enumerate(areas) if area.is_tissue(tissue_classes)}
    annotations = [area for area in tissue.values() if area.is_drawn]
    with_tissue = {area.core for area in annotations}
    return [
        area
        for number, area in tissue.items()
        if not area.is_core or not (number in with_tissue or any(_lies_in(drawing, area) for drawing in annotations))
    ]


def shortage_of(areas: Sequence[Area], tissue_classes: Collection[str]) -> str:
    """Say why no area of a file is tissue, and what to do."""
    if not areas:
        return "no polygon in it; draw the tissue as areas, or move the file away"
    names = first_few(sorted({area.class_name for area in areas}))
    if tissue_classes:
        return f"no area of --tissue_classes {','.join(tissue_classes)} in it; there are {names}"
    return f"none of its areas is tissue, by their classes ({names}); draw the tissue too, or give --tissue_classes"


def _children(holder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the objects inside another, which are a list or a collection."""
    inside = holder.get("childObjects") or ()
    if isinstance(inside, Mapping):
        inside = inside.get("features") or ()
    return [child for child in inside if isinstance(child, Mapping)]


def _is_ignored(word: str) -> bool:
    return word.startswith(CUT_OUT) or (word.endswith(_IGNORED_MARK) and word != _REGION)


def _lies_in(area: Area, core: Area) -> bool:
    """Return whether the middle of an area lies in a core."""
    middle = np.mean(area.polygons[0][0], axis=0)
    return any(is_inside(middle, polygon[0]) for polygon in core.polygons)


def _missing_mark(feature: Mapping[str, Any], properties: Mapping[str, Any]) -> bool | None:
    """Return whether an object is marked as a missing core, in any of the variants; None if it has no such mark."""
    metadata = properties.get("metadata")
    for holder in (properties, feature, metadata if isinstance(metadata, Mapping) else {}):
        if holder.get("isMissing") is not None:
            return str(holder["isMissing"]).strip().lower() in ("true", "1", "yes")
    return None


def _object_type(feature: Mapping[str, Any], properties: Mapping[str, Any]) -> str:
    """Return QuPath's type of the object in lower case, such as "tmacore" or "annotation"; in old exports its `id`."""
    kind = properties.get("objectType") or properties.get("object_type")
    if kind is None and str(feature.get("id", "")).startswith("Path"):
        kind = feature["id"]
    return re.sub("[^a-z]", "", str(kind or "").lower())


def _class_words(classification: Any) -> list[str]:
    """Return the words of a class: QuPath writes a derived one as "Tumor: Fold", as `names`, or, in old versions, as a
    name with a `parentClass`.
    """
    if isinstance(classification, str):
        return [word.strip() for word in classification.split(":") if word.strip()]
    if isinstance(classification, Mapping):
        return [word for key in ("parentClass", "name", "names") for word in _class_words(classification.get(key))]
    return [word for name in classification for word in _class_words(name)] if isinstance(classification, list) else []


def _features(content: Any, path: Path) -> list[Mapping[str, Any]]:
    """Return the features of a collection, a bare list, a single feature or a bare geometry."""
    if isinstance(content, Mapping) and content.get("type") == "FeatureCollection":
        content = content.get("features")
    if isinstance(content, Mapping):
        content = [content if content.get("type") == "Feature" else {"type": "Feature", "geometry": content}]
    if not isinstance(content, list) or not all(isinstance(feature, Mapping) for feature in content):
        raise SlideError(f"{path}: not GeoJSON; expected a collection or a list of features, as QuPath exports them")
    return content


def _polygons(geometry: Any, path: Path) -> Iterator[list[Ring]]:
    """Yield the polygons of a geometry, each a list of rings (n, 2)."""
    kind = geometry.get("type") if isinstance(geometry, Mapping) else None
    if kind == "GeometryCollection":
        for member in geometry.get("geometries", []):
            yield from _polygons(member, path)
    elif kind in ("Polygon", "MultiPolygon"):
        coordinates = geometry.get("coordinates") or []
        try:
            polygons = [
                [np.array(ring, dtype=float)[:, :2] for ring in polygon]
                for polygon in ([coordinates] if kind == "Polygon" else coordinates)
            ]
        except (TypeError, ValueError, IndexError) as error:
            raise SlideError(f"{path}: a polygon's coordinates are not a list of rings of [x, y]") from error
        for rings in polygons:
            if not rings or not all(len(ring) > 2 and np.isfinite(ring).all() for ring in rings):
                raise SlideError(f"{path}: a polygon without three finite corners; draw it again")
            yield rings
    else:
        log.warning("%s: %s is not an area; left out", path, kind or "an empty geometry")
