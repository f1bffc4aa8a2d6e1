"""The feature passport: how a bag's patches were cut and encoded, carried by its file and by every model trained on it.

`recipe` is what a user chose and is the same for every slide of an extraction; `slide` is what was found and delivered
for one slide; `software` are package versions. Two bags fit together when what is known of both recipes agrees.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
# What makes features incomparable when it differs; stride, tissue threshold and level do not (mpp is compared apart).
ENCODING_FIELDS = ("backbone", "weights_digest", "transform", "patch_size")
# Where mpp is not known, other toolkits tell the magnification the patches were read at; ours do not.
COMPARED_FIELDS = (*ENCODING_FIELDS, "magnification")
# Scanners of one nominal magnification differ by about this much (0.22 to 0.25 um/px at "40x").
MPP_TOLERANCE = 0.15
# Of what differs a message names so many settings, each value in so many characters.
_MOST_DIFFERENCES, _MOST_CHARACTERS = 4, 60
# The backbones that go by several names, in hubs and other toolkits; case, "_" and "-" make no other name.
BACKBONE_ALIASES = {
    "resnet50": ("resnet50.tv_in1k", "timm/resnet50.tv_in1k", "resnet50_imagenet"),
    "phikon-v2": ("owkin/phikon-v2", "phikonv2"),
    "uni": ("uni_v1", "MahmoodLab/uni", "mahmood-uni"),
    "uni2-h": ("uni_v2", "uni2", "uni2h", "MahmoodLab/UNI2-h", "mahmood-uni2"),
    "virchow2": ("virchow_v2", "virchow-2", "paige-ai/Virchow2"),
    "h-optimus-0": ("hoptimus0", "h-optimus0", "bioptimus/H-optimus-0"),
    "h-optimus-1": ("hoptimus1", "h-optimus1", "bioptimus/H-optimus-1"),
    "gigapath": ("prov-gigapath", "prov-gigapath/prov-gigapath"),
}


@dataclass(frozen=True)
class Passport:
    """`recipe`: backbone, weights_digest, transform, precision, dtype, patch_size (px at the level read), stride,
    level, tissue_threshold, tissue, edge (None where it was dropped). `slide`: name, width, height, mpp,
    mpp_delivered, patch_size_level0, quick_hash.
    """

    recipe: dict[str, Any]
    slide: dict[str, Any] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        content = {"schema": self.schema, "recipe": self.recipe, "slide": self.slide, "software": self.software}
        return json.dumps(content, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Passport":
        """Raises ValueError, KeyError or TypeError for a text that is no passport."""
        content = json.loads(text, parse_constant=_no_number)
        found = cls(content["recipe"], content["slide"], content["software"], content["schema"])
        if not all(isinstance(part, dict) for part in (found.recipe, found.slide, found.software)):
            raise ValueError("recipe, slide or software is not a set of fields")
        return found


def backbone_name(name: str) -> str:
    """The one name of a backbone, whatever alias and case it is called by; an unknown one's own, in small letters.

    `timm:<model>` stays as it is.
    """
    prefix, colon, model = name.strip().partition(":")
    if colon and prefix.lower() == "timm":
        return f"timm:{model}"
    return _ONE_NAME.get(_squeezed(name), _squeezed(name))


def recipe_differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], fields: Iterable[str], *, strict: bool = False
) -> list[str]:
    """What differs, as 'field: found X, expected Y', of a field that is a set of settings each setting that does; only
    fields known (not None) on both sides can differ, unless `strict`.
    """
    differences = []
    for name in fields:
        left, right = expected.get(name), found.get(name)
        if left != right and (strict or (left is not None and right is not None)):
            differences += _differences_of(name, left, right)
    return differences


def first_differences(differences: Sequence[str]) -> str:
    """Return the first few differences in a line, and how many more there are: for messages."""
    more = len(differences) - _MOST_DIFFERENCES
    return "; ".join(differences[:_MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def mpp_difference(expected: tuple[float, float] | None, found: float | None) -> list[str]:
    """Like `recipe_differences`, for the delivered um/px against the (least, greatest) seen in training."""
    if expected is None or found is None:
        return []
    least, greatest = expected
    if least / (1 + MPP_TOLERANCE) <= found <= greatest * (1 + MPP_TOLERANCE):
        return []
    return [f"mpp: found {found:.4g} um/px, expected {least:.4g} to {greatest:.4g}"]


def unknown_fields(expected: Mapping[str, Any], found: Mapping[str, Any], fields: Iterable[str]) -> list[str]:
    """The fields that could not be compared because one side does not know them."""
    return [name for name in fields if expected.get(name) is None or found.get(name) is None]


def _differences_of(name: str, expected: Any, found: Any) -> list[str]:
    if not (isinstance(expected, dict) and isinstance(found, dict)):
        return [f"{name}: found {_short(found)}, expected {_short(expected)}"]
    unlike = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    return [line for key in unlike for line in _differences_of(f"{name}.{key}", expected.get(key), found.get(key))]


def _short(value: Any) -> str:
    """Return a value as text of a few characters: of a digest, or of what is long, the beginning."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    is_digest = len(text) == 64 and all(character in "0123456789abcdef" for character in text)
    if is_digest:
        return text[:12]
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _squeezed(name: str) -> str:
    return name.strip().lower().replace("_", "-")


_ONE_NAME = {_squeezed(alias): name for name, aliases in BACKBONE_ALIASES.items() for alias in (name, *aliases)}
