"""The settings of an extraction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.core.errors import ConfigError
from utils.core.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class Extraction(Settings):
    """The recipe of the features, and how they are computed."""

    backbone: str = option(
        "resnet50",
        "a name in README's table (resnet50, uni, virchow2, gigapath, stain, ...) or timm:<any timm model>, "
        "also of the Hugging Face hub: timm:hf-hub:OWNER/NAME or ...@REVISION",
    )
    weights: Path | None = option(None, "local weights (.pth, .bin, .safetensors) instead of a download")
    patch_size: int = option(256, "patch edge in pixels, at --level, --mpp or --magnification", least=1)
    stride: int | None = option(
        None,
        "distance between patch corners, in pixels at the resolution read (default: the patch size)",
        least=1,
    )
    level: int | None = option(
        None, "pyramid level to read (default: 0, the finest, unless --mpp or --magnification is given)", least=0
    )
    mpp: float | None = option(
        None, "um per pixel of the patches, resampled from the nearest finer level: 0.5 is 20x", least=0.05, most=40
    )
    magnification: float | None = option(None, "the same as --mpp 10/X: 20 is 0.5 um/px", least=0.25, most=200)
    allow_upsample: bool = option(False, "enlarge slides that are more than 5%% coarser than --mpp or --magnification")
    tissue_threshold: float = option(0.5, "least fraction of tissue in a patch (0 keeps every patch)", least=0, most=1)
    qc: bool = option(False, "drop patches that are out of focus, nearly white, or marked with a pen")
    skip_damaged: bool = option(False, "drop and count patches that cannot be read, instead of failing the slide")
    edge: Literal["drop", "keep"] = option(
        "drop",
        "the rest that the grid leaves at the right and bottom edges: drop it, or keep it in one more column and row "
        "of patches that end at the edge and overlap their neighbours",
    )
    batch_size: int = option(64, "patches per forward pass", least=1)
    num_workers: int | Literal["auto"] = option("auto", "threads that read patches; auto: one per processor", least=1)
    device: str = option("auto", "auto, cpu, mps, cuda, cuda:N, or several that share the slides: cuda:0,cuda:1")
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = option(
        "auto",
        "precision of the backbone; auto: its own on a CUDA device, where TF32 stands for fp32; fp32 on other devices",
    )
    dtype: Literal["float16", "float32"] = option("float16", "precision of the stored features")

    def __post_init__(self) -> None:
        super().__post_init__()
        flags = [f"--{name}" for name in ("level", "mpp", "magnification") if getattr(self, name) is not None]
        if len(flags) > 1:
            raise ConfigError(f"{' and '.join(flags)}: give only one of them")
        if self.allow_upsample and self.target_mpp is None:
            raise ConfigError("--allow_upsample goes with --mpp or --magnification; leave it out")

    @property
    def target_mpp(self) -> float | None:
        """um per pixel of the patches, None if a level is read."""
        return 10 / self.magnification if self.magnification else self.mpp
