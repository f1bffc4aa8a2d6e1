"""The settings of an extraction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.core.errors import ConfigError
from utils.core.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class Extraction(Settings):
    """The feature recipe, and how it is computed."""

    backbone: str = option(
        "resnet50", "a name of README's table (resnet50, uni, virchow2, gigapath, stain, ...) or timm:<any timm model>"
    )
    weights: Path | None = option(None, "local weights (.pth, .bin, .safetensors) instead of a download")
    patch_size: int = option(256, "patch edge in pixels, at the resolution asked for", least=1)
    stride: int | None = option(
        None,
        "distance between patch corners, in pixels at the resolution read (default: the patch size)",
        least=1,
    )
    level: int | None = option(
        None, "pyramid level, read as it is (default: 0, the finest, unless --mpp or --magnification is given)", least=0
    )
    mpp: float | None = option(
        None, "um per pixel of the patches, resampled from the nearest finer level: 0.5 is 20x", least=0.05, most=40
    )
    magnification: float | None = option(None, "the same as --mpp 10/X: 20 is 0.5 um/px", least=0.25, most=200)
    allow_upsample: bool = option(False, "enlarge slides that are coarser than --mpp or --magnification by over 5%%")
    tissue_threshold: float = option(0.5, "least fraction of tissue in a patch (0 keeps every patch)", least=0, most=1)
    qc: bool = option(False, "drop patches that are out of focus, nearly white, or inked by a pen")
    skip_damaged: bool = option(False, "drop the patches that cannot be read, instead of the slide; they are counted")
    edge: Literal["drop", "keep"] = option(
        "drop",
        "what the grid leaves over at the right and bottom edge: drop it, or keep it in one last column and row of "
        "patches that end at the edge and overlap the ones before",
    )
    batch_size: int = option(64, "patches per forward pass", least=1)
    num_workers: int | Literal["auto"] = option("auto", "threads that read patches; auto: one per processor", least=1)
    device: str = option("auto", "auto, cpu, mps, cuda, cuda:N, or several: cuda:0,cuda:1 share the slides out")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "the backbone computes in: auto is its own on a CUDA device, fp32 elsewhere"
    )
    dtype: Literal["float16", "float32"] = option("float16", "precision of the stored features")

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = [name for name in ("level", "mpp", "magnification") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise ConfigError(f"{' and '.join('--' + name for name in asked)}: give only one of them")
        if self.allow_upsample and self.target_mpp is None:
            raise ConfigError("--allow_upsample goes with --mpp or --magnification; leave it out")

    @property
    def target_mpp(self) -> float | None:
        """um per pixel of the patches, or None where a level is read."""
        return 10 / self.magnification if self.magnification else self.mpp
