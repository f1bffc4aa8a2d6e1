"""Read what attributes and records of feature files say of a recipe and a slide.

A value that is missing, of another type, or the word None that TRIDENT writes for it, is unknown.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from utils.core.passport import Passport
from utils.core.recipe import Recipe, backbone_name

# No slide has so many pixels a side.
LONGEST = 10**8


def footprint(attributes: Mapping[str, Any]) -> int | None:
    """Return a patch's edge in level-0 pixels: as stated, or from CLAM's downsample, which is the same in x and y."""
    patch_size, downsample = as_positive(attributes.get("patch_size")), attributes.get("downsample")
    factors = {as_positive(factor) for factor in np.ravel(downsample)} if downsample is not None else set()
    factor = factors.pop() if len(factors) == 1 else None
    from_downsample = as_length(patch_size * factor) if patch_size and factor else None
    return as_length(attributes.get("patch_size_level0")) or from_downsample


def grid_fields(attributes: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the recipe's patch size and stride, in pixels at the resolution read, and that magnification."""
    patch_size, overlap = as_length(attributes.get("patch_size")), as_number(attributes.get("overlap"))
    stride = None if patch_size is None or overlap is None else as_length(patch_size - overlap)
    magnification = as_positive(attributes.get("target_magnification"))
    return {"patch_size": patch_size, "stride": stride, "magnification": magnification}


def slide_fields(attributes: Mapping[str, Any]) -> dict[str, Any]:
    size = {side: as_length(attributes.get(f"level0_{side}")) for side in ("width", "height")}
    return size | {"objective": as_positive(attributes.get("level0_magnification"))}


def mpp_fields(tile_um: float | None, tile_px: int | None) -> dict[str, Any]:
    return {"mpp_delivered": tile_um / tile_px if tile_um and tile_px else None}


def make_passport(recipe: Mapping[str, Any], slide: Mapping[str, Any] | None = None) -> Passport | None:
    """Return a passport of all values that are not None; None if no value of the recipe is known."""
    recipe, slide = (
        {name: value for name, value in record.items() if value is not None} for record in (recipe, slide or {})
    )
    return Passport(Recipe.from_dict(recipe), slide) if recipe else None


def backbone_of(value: Any) -> str | None:
    name = as_text(value)
    return backbone_name(name) if name else None


def as_text(value: Any) -> str | None:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text if isinstance(text, str) and text not in ("", "None") else None


def as_number(value: Any) -> float | None:
    try:
        number = float(np.asarray(value).item())
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_positive(value: Any) -> float | None:
    number = as_number(value)
    return number if number is not None and number > 0 else None


def as_length(value: Any) -> int | None:
    """Return a length in whole pixels; None unless the value is a plausible one."""
    edge = round(as_positive(value) or 0)
    return edge if 0 < edge < LONGEST else None
