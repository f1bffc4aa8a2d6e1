"""The recipe of features: how patches were cut and encoded, the same for every slide of an extraction.

It is told by flags, recorded in every feature file's passport and in every checkpoint, completed where other toolkits'
files leave something open, and compared wherever features and a model, or two files, meet.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from utils.core.differences import differences
from utils.core.errors import RecipeError

# What makes features incomparable when it differs; stride, tissue threshold and level do not (mpp is compared apart).
ENCODING_FIELDS = ("backbone", "weights_digest", "transform", "patch_size")
# Where mpp is not known, other toolkits tell the magnification the patches were read at; ours do not.
COMPARED_FIELDS = (*ENCODING_FIELDS, "magnification")
# What the features of this tool record, known or not.
OUR_FIELDS = (
    "backbone", "weights_digest", "transform", "precision", "dtype", "patch_size", "stride", "level", "mpp",
    "tissue_threshold", "tissue", "qc", "edge",
)  # fmt: skip
# What a user may ask for when a raw slide is predicted.
ASKED_FIELDS = ("backbone", "patch_size", "stride", "level", "mpp", "tissue_threshold")
# Scanners of one nominal magnification differ by about this much (0.22 to 0.25 um/px at "40x").
MPP_TOLERANCE = 0.15
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
class Recipe:
    """How features are made; None where that is not known.

    Attributes
        backbone: its one name; weights_digest: of its weights (SHA-256); transform: how patches become its input.
        precision: what the backbone computed in; dtype: what the features are stored in.
        patch_size, stride: pixels at the resolution read.
        level: the pyramid level read, or mpp: the um per pixel resampled to; magnification: other toolkits' word.
        tissue_threshold: least fraction of tissue in a patch; tissue: the detector's settings.
        qc: settings of the quality control, None without it; edge: "keep", None where the grid's rest was dropped.
        others: what a file records besides.
        recorded: the names that a file records, known or not, in its order.
    """

    backbone: str | None = None
    weights_digest: str | None = None
    transform: Mapping[str, Any] | None = None
    precision: str | None = None
    dtype: str | None = None
    patch_size: int | None = None
    stride: int | None = None
    level: int | None = None
    mpp: float | None = None
    tissue_threshold: float | None = None
    tissue: Mapping[str, Any] | None = None
    qc: Mapping[str, Any] | None = None
    edge: str | None = None
    magnification: float | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    recorded: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Return the recipe that a passport, a checkpoint or a `recipe.json` holds."""
        own = {name: value for name, value in content.items() if name in _OWN}
        others = {name: value for name, value in content.items() if name not in _OWN}
        return cls(**own, others=others, recorded=tuple(content))

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads: all that was recorded, and what is known besides."""
        known = [name for name in _OWN if getattr(self, name) is not None]
        return {name: self[name] for name in dict.fromkeys([*self.recorded, *known])}

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name) if name in _OWN else self.others.get(name)

    def differences(self, other: "Recipe", names: Iterable[str] = COMPARED_FIELDS) -> list[str]:
        """Return in what `other` differs from this, of the fields that both know (see `core.differences`)."""
        return differences(self.as_dict(), other.as_dict(), names)

    def contradictions(self, asked: "Recipe") -> list[str]:
        """Return in what the settings asked for contradict this recipe, if it says anything of them."""
        lines = self.differences(asked, ASKED_FIELDS)
        for name, instead in (("level", "mpp"), ("mpp", "level")):  # one or the other is read
            if asked[name] is not None and self[name] is None and self[instead] is not None:
                lines.append(f"{name}: found {asked[name]}, expected {instead} {self[instead]}")
        return lines

    def unknown_fields(self, other: "Recipe", names: Iterable[str] = ENCODING_FIELDS) -> list[str]:
        """Return the fields that cannot be compared because one of the two does not know them."""
        return [name for name in names if self[name] is None or other[name] is None]

    def completed(self, asked: "Recipe", **by_default: Any) -> "Recipe":
        """Return this recipe with what is asked for where it says nothing, else the defaults; patches that are not said
        to overlap lie side by side.
        """
        left_open = by_default | asked.as_dict()
        known = replace(self, **{name: value for name, value in left_open.items() if self[name] is None})
        return known if known.stride is not None else replace(known, stride=known.patch_size)

    def settings(self) -> dict[str, Any]:
        """Return the settings of an extraction by this recipe, under their names in `features.settings.Extraction`.

        Raises RecipeError where it leaves one open.
        """
        resolution = "level" if self.mpp is None else "mpp"
        needed = ("backbone", "patch_size", "stride", resolution, "tissue_threshold", "dtype")
        missing = [name for name in needed if self[name] is None]
        if missing:
            raise RecipeError(
                f"the training features' recipe does not say {', '.join(missing)}; give it "
                f"({', '.join('--' + name for name in missing)}), or extract the slide yourself"
            )
        return {name: self[name] for name in needed} | {"qc": bool(self.qc), "edge": self.edge or "drop"}

    def __str__(self) -> str:
        """Return the recipe in a line, for a person."""
        resolution = f"level {self.level}" if self.mpp is None else f"{self.mpp:g} µm/px"
        parts = [
            self.backbone,
            f"patches of {self.patch_size} px at {resolution}",
            f"{self.stride} px apart",
            f"at least {self.tissue_threshold:.0%} tissue",
            f"quality control {'on' if self.qc else 'off'}",
            *(["edges kept"] if self.edge == "keep" else []),
        ]
        return ", ".join(map(str, parts))


def mpp_difference(expected: tuple[float, float] | None, found: float | None) -> list[str]:
    """Like `Recipe.differences`, for the delivered um/px against the (least, greatest) seen in training."""
    if expected is None or found is None:
        return []
    least, greatest = expected
    if least / (1 + MPP_TOLERANCE) <= found <= greatest * (1 + MPP_TOLERANCE):
        return []
    return [f"mpp: found {found:.4g} um/px, expected {least:.4g} to {greatest:.4g}"]


def backbone_name(name: str) -> str:
    """The one name of a backbone, whatever alias and case it is called by; an unknown one's own, in small letters.

    `timm:<model>` stays as it is.
    """
    prefix, colon, model = name.strip().partition(":")
    if colon and prefix.lower() == "timm":
        return f"timm:{model}"
    return _ONE_NAME.get(_normalised_name(name), _normalised_name(name))


def _normalised_name(name: str) -> str:
    return name.strip().lower().replace("_", "-")


_OWN = tuple(part.name for part in fields(Recipe) if part.name not in ("others", "recorded"))
_ONE_NAME = {_normalised_name(alias): name for name, aliases in BACKBONE_ALIASES.items() for alias in (name, *aliases)}
