"""The settings of `predict.py --visualize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.core.errors import ConfigError
from utils.core.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class Pictures(Settings):
    """What `--visualize` draws, and in which colours."""

    visualize: bool = option(False, "draw the attention: heatmap, report page, patches, QuPath tiles and .npz")
    wsi: Path | None = option(
        None,
        "the slide of the feature file to draw on, or the folder of slides for --input_dir (default: white ground)",
        metavar="FILE|DIR",
    )
    top_k: int = option(10, "how many patches with the highest attention are shown (0: none)", least=0)
    scale: Literal["attention", "percentile", "uniform"] = option(
        "percentile", "what colour shows: attention, its percentile, or how many times uniform it is (logarithmic)"
    )
    cmap: str = option("viridis", "Matplotlib colour map")
    alpha: float = option(0.5, "opacity of the heatmap over the slide", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wsi is not None and not self.visualize:
            raise ConfigError(f"--wsi {self.wsi}: the slide to draw on; give --visualize with it")
        for name in ("top_k", "scale", "cmap", "alpha"):
            if not self.visualize and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f"--{name} {getattr(self, name)}: how pictures look; give --visualize with it")
