"""Determine the um/px of a slide from all metadata in its file; unknown if these contradict each other."""

import html
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

# um/px. The resolutions of screens and printers, 72 to 600 dpi, are 353 to 42 um/px and so not mistaken for a scan's.
PLAUSIBLE_MPP = (0.05, 40.0)
NOT_IN_FILE = "not in the file"

_DISAGREEMENT = 0.05  # if x and y, or two sources, differ by more, one is wrong, and nobody knows which
_UM_AT_1X = 10.0  # a nominal 40x objective gives 0.25 um/px, a 20x one 0.5
# With camera adapters a 20x objective can give 0.24 um/px: 2.1 times as fine as nominal.
_ODD_FOR_OBJECTIVE, _WRONG_FOR_OBJECTIVE = 2.2, 5.0
_UM_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}
# Symbols, whose case matters (mm, Mm), and words. `_um_per` unifies the two characters for micro.
_UM_PER_SYMBOL = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "\N{GREEK SMALL LETTER MU}m": 1.0, "um": 1.0, "nm": 1e-3,
    "\N{LATIN CAPITAL LETTER A WITH RING ABOVE}": 1e-4, "in": 25_400.0, '"': 25_400.0, "thou": 25.4,
}  # fmt: skip
_UM_PER_WORD = {
    "meter": 1e6, "decimeter": 1e5, "centimeter": 1e4, "millimeter": 1e3, "micrometer": 1.0, "micron": 1.0,
    "nanometer": 1e-3, "angstrom": 1e-4, "inch": 25_400.0, "inche": 25_400.0,
}  # fmt: skip
_SHARED = "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing"
# Vendors' properties of um/px, or mm, in x and y, and the factor to um.
_VENDOR_PROPERTIES = [
    ("openslide.mpp-x", "openslide.mpp-y", 1.0),
    ("aperio.MPP", "aperio.MPP", 1.0),
    ("ventana.ScanRes", "ventana.ScanRes", 1.0),
    ("mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X", "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y", 1),
    (f"{_SHARED}[1]", f"{_SHARED}[0]", 1e3),  # DICOM puts the distance of rows first
]


@dataclass(frozen=True)
class Resolution:
    """The um/px in a file.

    Attributes:
        mpp: um per level-0 px, or None.
        problem: why there is none.
        doubt: why the mpp may be wrong, or None.
    """

    mpp: float | None
    problem: str | None = None
    doubt: str | None = None


# A source's name and its um/px in x and y.
_Source = tuple[str, float | None, float | None]


def file_resolution(properties: Mapping[str, str], width: int, height: int, *, ome_image: int | None = 0) -> Resolution:
    """Return the um/px from OpenSlide's properties of a slide of (width, height) level-0 px.

    The slide is the image `ome_image` of OME-XML, if it is any of them. Implausible values are ignored if there are
    others. The remaining ones must agree: x with y, and the sources with each other and with the objective.
    """
    sources = _vendor_sources(properties, width, height, ome_image)
    plausible = [source for source in sources if _is_plausible(source)]
    if not plausible:
        tags = [source for source in [_tiff_source(properties)] if _values(source)]
        sources = sources or tags
        plausible = [source for source in tags if _is_plausible(source)]
    if not sources:
        return Resolution(None, NOT_IN_FILE)
    if not plausible:
        low, high = PLAUSIBLE_MPP
        return Resolution(None, f"{_values_words(sources[0])} um/px in the file is not plausible ({low:g} to {high:g})")
    for source in plausible:
        if _apart(_values(source)):
            return Resolution(None, f"x and y disagree in the file ({_values_words(source)} um/px)")
    means = [sum(_values(source)) / len(_values(source)) for source in plausible]
    if _apart(means):
        listed = ", ".join(f"{mean:.4g} ({name})" for (name, _, _), mean in zip(plausible, means, strict=True))
        return Resolution(None, f"the file contradicts itself: {listed} um/px")
    return _compared_with_objective(means[0], number(properties.get("openslide.objective-power")))


def number(text: str | None) -> float | None:
    """Parse a finite number; return None for any other text."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _compared_with_objective(mpp: float, objective: float | None) -> Resolution:
    if objective is None or objective <= 0:
        return Resolution(mpp)
    nominal = _UM_AT_1X / objective
    factor = max(mpp / nominal, nominal / mpp)
    problem = f"{mpp:.4g} um/px in the file does not fit its {objective:g}x objective (about {nominal:.2g})"
    if factor > _WRONG_FOR_OBJECTIVE:
        return Resolution(None, problem)
    return Resolution(mpp, doubt=f"{problem}; taken as it is" if factor > _ODD_FOR_OBJECTIVE else None)


def _vendor_sources(properties: Mapping[str, str], width: int, height: int, ome_image: int | None) -> list[_Source]:
    sources: list[_Source] = [
        (name_x, _scaled(properties.get(name_x), factor), _scaled(properties.get(name_y), factor))
        for name_x, name_y, factor in _VENDOR_PROPERTIES
    ]
    for_width, for_height = (_scaled(properties.get(f"hamamatsu.Physical{side}"), 1e-3) for side in ("Width", "Height"))
    sources.append(("hamamatsu.PhysicalWidth", for_width and for_width / width, for_height and for_height / height))
    spacing = re.findall(r"[^\s\"]+", properties.get("philips.DICOM_PIXEL_SPACING", ""))  # mm, rows first
    if len(spacing) == 2:
        sources.append(("philips.DICOM_PIXEL_SPACING", _scaled(spacing[1], 1e3), _scaled(spacing[0], 1e3)))
    description = properties.get("tiff.ImageDescription", "")
    sources += [_ome_source(description, ome_image), _imagej_source(description, properties)]
    return [source for source in sources if _values(source)]


def ome_images(description: str) -> list[str]:
    """Return the `Pixels` elements of OME-XML with their attributes, one per image; none of another description."""
    if not re.search(r"<(?:\w+:)?OME\b", description):
        return []
    elements = re.split(r"<(?:\w+:)?Pixels\b", description)[1:]
    return [re.split(r"</(?:\w+:)?Pixels>", element)[0] for element in elements]


def _ome_source(description: str, image: int | None) -> _Source:
    """Return PhysicalSizeX and PhysicalSizeY of an image of OME-XML, in um unless a unit is given."""
    images = ome_images(description)
    pixels = images[image].split(">")[0] if image is not None and image < len(images) else ""
    attributes = dict(re.findall(r"(\w+)\s*=\s*[\"']([^\"']*)[\"']", html.unescape(pixels)))

    def size(axis: str) -> float | None:
        um = _um_per(attributes.get(f"PhysicalSize{axis}Unit", "um"))
        return _scaled(attributes.get(f"PhysicalSize{axis}"), um) if um else None

    return "OME-XML", size("X"), size("Y")


def _imagej_source(description: str, properties: Mapping[str, str]) -> _Source:
    """Return ImageJ's um/px: the resolution tags are px per unit, which its description names."""
    unit = re.search(r"^unit=(.+)$", description, re.MULTILINE) if description.startswith("ImageJ=") else None
    um = _um_per(html.unescape(unit[1]).replace("\\u00B5", "\N{MICRO SIGN}")) if unit else None
    x, y = (number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
    return "ImageJ", um / x if um and x else None, um / y if um and y else None


def _um_per(unit: str) -> float | None:
    """Return the um per unit of length, given its symbol or English name; None for pixels and unknown units."""
    symbol = unicodedata.normalize("NFKC", unit).strip()
    word = symbol.lower().removesuffix("s")
    word = f"{word.removesuffix('metre')}meter" if word.endswith("metre") else word
    return _UM_PER_SYMBOL.get(symbol) or _UM_PER_WORD.get(word)


def _tiff_source(properties: Mapping[str, str]) -> _Source:
    """Return the um/px from the resolution tags, which are px per unit; Trestle's are um/px."""
    x, y = (number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
    if properties.get("openslide.vendor") != "trestle":
        um = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
        # Writers that do not know the resolution write one px per unit.
        x, y = (um / value if um and value and value != 1 else None for value in (x, y))
    return "TIFF resolution", x, y


def _scaled(text: str | None, factor: float) -> float | None:
    value = number(text)
    return None if value is None else value * factor


def _values(source: _Source) -> list[float]:
    return [value for value in source[1:] if value is not None]


def _is_plausible(source: _Source) -> bool:
    low, high = PLAUSIBLE_MPP
    return all(low <= value <= high for value in _values(source))


def _apart(values: list[float]) -> bool:
    return max(values) > min(values) * (1 + _DISAGREEMENT)


def _values_words(source: _Source) -> str:
    values = [f"{value:.4g}" for value in _values(source)]
    return " x ".join(values if len(set(values)) > 1 else values[:1])
