"""Write attention as GeoJSON tiles that QuPath opens on the slide, coloured by percentile."""

import io
import json
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

from utils.core.files import whole_file
from utils.pictures.attention_map import ATTENTION, AttentionMap
from utils.pictures.blank_slide import BlankSlide
from utils.pictures.overlay import GREY
from utils.slides.outline_origin import qupath_offset
from utils.slides.slide import Slide

# From so many tiles on they are zipped, as QuPath reads them too: hundreds of bytes a tile become about forty.
ZIPPED_FROM = 50_000
# Percentiles that bound the classes; QuPath shows and hides each class.
_STEPS = (0, 20, 40, 60, 80, 100)


def write_attention(
    path: Path,
    attention: AttentionMap,
    slide: Slide | BlankSlide,
    cmap: str,
    record: Mapping[str, Any],
    more: Mapping[str, NDArray] | None = None,
    *,
    model: str = "",
) -> None:
    """Write one feature per patch (RFC 7946), in QuPath's frame: level-0 px from the corner of the scanned area.

    The path ends in .geojson, or in .zip for a zipped file. `model` tells one model's tiles from another's: it is in
    their ids, and their classes are derived from a class of that name.

    Measurements are attention, its percentile within the slide, the rank from 1 (ties share the mean of theirs), how
    many patches are equal, and `more`, each `(N,)`, by their names. The class is the percentile's fifth; patches equal
    to so many others that they have no rank are a class of their own. The offset of the frame and `record`, which
    QuPath does not read, are under "litemil".
    """
    offset = qupath_offset(slide.bounds)
    frame = {"slide": slide.name, "offset": offset.tolist(), "width": slide.width, "height": slide.height}
    frame |= {} if attention.name == ATTENTION else {"attention_is": attention.name}
    head = json.dumps(frame | dict(record), allow_nan=False)
    names = "/".join(filter(None, [slide.name, model]))
    features = _features(names, attention, offset, _classes(attention, cmap, model), more or {})
    with whole_file(path) as unfinished, _opened(unfinished, path) as file:
        file.write(f'{{"type": "FeatureCollection", "litemil": {head}, "features": [')
        for number, feature in enumerate(features):
            file.write(f"{',' if number else ''}\n{feature}")
        file.write("\n]}\n")


@contextmanager
def _opened(unfinished: Path, path: Path) -> Iterator[TextIO]:
    """Open a file, or one in a zip file if the path ends so, for text."""
    if path.suffix != ".zip":
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        return
    entry = zipfile.ZipInfo(path.stem)  # without the time of writing, so that equal maps are equal files
    entry.compress_type = zipfile.ZIP_DEFLATED
    with (
        zipfile.ZipFile(unfinished, "w") as archive,
        archive.open(entry, "w", force_zip64=True) as content,
        io.TextIOWrapper(content, encoding="utf-8", newline="\n") as file,
    ):
        yield file


def _features(
    name: str,
    attention: AttentionMap,
    offset: NDArray[np.float64],
    classes: tuple[Sequence[Mapping[str, Any]], NDArray[np.int64]],
    more: Mapping[str, NDArray],
) -> Iterator[str]:
    """Yield the feature of each patch; `name` is that of the slide and the model, for ids."""
    corners = attention.coords - offset
    measured = {
        "Attention": attention.attention, "Attention percentile": attention.percentiles.round(3),
        "Attention rank": attention.mean_ranks, "Patches of equal attention": attention.equals, **more,
    }  # fmt: skip
    kinds, steps = classes
    rows = zip(
        corners.tolist(), (corners + attention.size_level0).tolist(), steps.tolist(),
        zip(*(values.tolist() for values in measured.values()), strict=True), strict=True,
    )  # fmt: skip
    for (left, top), (right, bottom), step, values in rows:
        measurements = dict(zip(measured, map(_whole, values), strict=True))
        yield _feature(f"{name}/{left:g}/{top:g}", (left, top, right, bottom), kinds[step], measurements)


def _classes(attention: AttentionMap, cmap: str, model: str) -> tuple[list[Mapping[str, Any]], NDArray[np.int64]]:
    """Return QuPath's classes, and the index (N,) of each patch's."""
    name = f"{model}: {attention.name}" if model else attention.name.capitalize()
    colours = (colormaps[cmap](np.linspace(0, 1, len(_STEPS) - 1))[:, :3] * 255).round().astype(int).tolist()
    classes = [
        {"name": f"{name} {low}-{high}%", "color": colour}
        for low, high, colour in zip(_STEPS[:-1], _STEPS[1:], colours, strict=True)
    ]
    steps = np.clip(np.searchsorted(_STEPS, attention.percentiles, side="right") - 1, 0, len(classes) - 1)
    steps[attention.is_unranked] = len(classes)
    return [*classes, {"name": f"{name} equal, no rank", "color": [round(255 * value) for value in GREY]}], steps


def _whole(value: float) -> float:
    """Return a rank without a fraction as an int, which JSON writes without one."""
    return int(value) if value >= 1 and value == int(value) else value


def _feature(
    name: str,
    box: tuple[float, float, float, float],
    classification: Mapping[str, Any],
    measurements: Mapping[str, float],
) -> str:
    left, top, right, bottom = box
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    feature = {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "tile", "classification": classification, "measurements": measurements},
    }
    return json.dumps(feature, allow_nan=False)
