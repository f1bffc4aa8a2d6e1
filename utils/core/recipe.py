"""The recipe of features: how patches were cut and encoded, the same for every slide of an extraction.

It is set by flags and recorded in every feature file's passport and in every checkpoint. Gaps in other toolkits' files
are filled, and recipes are compared whenever features meet a model or other features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from utils.core.differences import differences
from utils.core.errors import RecipeError

# Features that differ in one of these cannot be compared. Stride, tissue threshold and level may differ; mpp is checked
# separately.
ENCODING_FIELDS = ("backbone", "weights_digest", "transform", "patch_size")
# Other toolkits record the magnification of their patches if the mpp is unknown; ours do not.
COMPARED_FIELDS = (*ENCODING_FIELDS, "magnification")
# What this tool records of its features, known or not.
OUR_FIELDS = (
    "backbone", "weights_digest", "transform", "precision", "dtype", "patch_size", "stride", "level", "mpp",
    "tissue_threshold", "tissue", "qc", "edge",
)  # fmt: skip
# What a user may set for the prediction of a raw slide.
ASKED_FIELDS = ("backbone", "patch_size", "stride", "level", "mpp", "tissue_threshold")
# Those of them that choose which patches of a slide are encoded, and change none of their features.
PATCH_CHOICE_FIELDS = ("stride", "tissue_threshold")
# Scanners of one nominal magnification differ by about this much (0.22 to 0.25 um/px at "40x").
MPP_TOLERANCE = 0.15
# The other names of backbones, in hubs and other toolkits; case does not matter, and "_" is "-".
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
    """How features are made; None is unknown.

    Attributes
        backbone: its canonical name; weights_digest: SHA-256 of its weights; transform: how patches become its input.
        precision: what the backbone computed in; dtype: what the features are stored in.
        patch_size, stride: pixels at the resolution read.
        level: the pyramid level read, or mpp: the um per pixel resampled to; magnification: for other toolkits' files.
        tissue_threshold: least fraction of tissue in a patch; tissue: the detector's settings.
        qc: settings of the quality control, None without it; edge: "keep", or None if the grid's rest was dropped.
        other_fields: anything else that a file records.
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
    other_fields: Mapping[str, Any] = field(default_factory=dict)
    recorded: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Return the recipe that a passport, a checkpoint or a `recipe.json` holds."""
        own = {name: value for name, value in content.items() if name in _OWN}
        other_fields = {name: value for name, value in content.items() if name not in _OWN}
        return cls(**own, other_fields=other_fields, recorded=tuple(content))

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads: every recorded field, and every other one that is known."""
        names = [name for name in _OWN if getattr(self, name) is not None]
        return {name: self[name] for name in dict.fromkeys([*self.recorded, *names])}

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name) if name in _OWN else self.other_fields.get(name)

    def differences(self, other: "Recipe", names: Iterable[str] = COMPARED_FIELDS) -> list[str]:
        """Return how `other` differs from this recipe in the fields that both know (see `core.differences`)."""
        return differences(self.as_dict(), other.as_dict(), names)

    def contradictions(self, flags: "Recipe") -> list[str]:
        """Return how the user's settings contradict this recipe, in the fields that it knows."""
        lines = self.differences(flags, ASKED_FIELDS)
        for name, instead in (("level", "mpp"), ("mpp", "level")):  # one or the other is read
            if flags[name] is not None and self[name] is None and self[instead] is not None:
                lines.append(f"{name}: found {flags[name]}, expected {instead} {self[instead]}")
        return lines

    def unknown_fields(self, other: "Recipe", names: Iterable[str] = ENCODING_FIELDS) -> list[str]:
        """Return the fields that cannot be compared because they are unknown in one of the two recipes."""
        return [name for name in names if self[name] is None or other[name] is None]

    def completed(self, flags: "Recipe", **defaults: Any) -> "Recipe":
        """Return this recipe with its unknown fields filled from the user's settings, else from the defaults. If there
        is no stride, patches lie side by side.
        """
        values = defaults | flags.as_dict()
        recipe = replace(self, **{name: value for name, value in values.items() if self[name] is None})
        return recipe if recipe.stride is not None else replace(recipe, stride=recipe.patch_size)

    def settings(self) -> dict[str, Any]:
        """Return the settings of an extraction with this recipe, named as in `features.settings.Extraction`.

        Raises RecipeError if one is unknown.
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
        """Return the recipe in a line, for people."""
        resolution = f"level {self.level}" if self.mpp is None else f"{self.mpp:g} µm/px"
        texts = [
            self.backbone,
            f"patches of {self.patch_size} px at {resolution}",
            f"{self.stride} px apart",
            f"at least {self.tissue_threshold:.0%} tissue",
            f"quality control {'on' if self.qc else 'off'}",
            *(["edges kept"] if self.edge == "keep" else []),
        ]
        return ", ".join(map(str, texts))


def mpp_difference(expected: tuple[float, float] | None, mpp: float | None) -> list[str]:
    """Return, as `Recipe.differences`, how the delivered um/px differs from the (least, greatest) seen in training."""
    if expected is None or mpp is None:
        return []
    least, greatest = expected
    if least / (1 + MPP_TOLERANCE) <= mpp <= greatest * (1 + MPP_TOLERANCE):
        return []
    return [f"mpp: found {mpp:.4g} um/px, expected {least:.4g} to {greatest:.4g}"]


def backbone_name(name: str) -> str:
    """Return the canonical name of a backbone for any of its aliases, in any case; an unknown name in small letters.

    `timm:<model>` stays as it is.
    """
    prefix, colon, model = name.strip().partition(":")
    if colon and prefix.lower() == "timm":
        return f"timm:{model}"
    return _ONE_NAME.get(_normalised_name(name), _normalised_name(name))


def _normalised_name(name: str) -> str:
    return name.strip().lower().replace("_", "-")


_OWN = tuple(item.name for item in fields(Recipe) if item.name not in ("other_fields", "recorded"))
_ONE_NAME = {_normalised_name(alias): name for name, aliases in BACKBONE_ALIASES.items() for alias in (name, *aliases)}
