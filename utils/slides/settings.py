"""Which slides `extractFeatures.py` reads, and where it writes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.core.errors import ConfigError
from utils.core.settings import Settings, option


def slides_csv_option() -> Any:
    """Return the field of a settings class for a table of slides' um per pixel."""
    return option(None, "table wsi,mpp: um per level-0 pixel of slides whose own value is missing or wrong")


def slide_mpp_option() -> Any:
    """Return the field of a settings class for the um per pixel of all slides."""
    return option(None, "um per level-0 pixel of all slides except those in --slides_csv", least=0.05, most=40)


@dataclass(frozen=True, kw_only=True)
class ExtractionFiles(Settings):
    """Which slides `extractFeatures.py` reads and where it writes."""

    input: Path | None = option(None, "one slide; give this or --input_dir", one_of="slides")
    input_dir: Path | None = option(
        None, "a folder of slides, searched with its subfolders; give this or --input", one_of="slides"
    )
    output: Path | None = option(None, "feature file for --input (default: beside the slide, <stem>.h5)")
    output_dir: Path | None = option(None, "folder for the feature files (required with --input_dir)")
    format: Literal["h5", "pt"] | None = option(None, "feature file format (default: h5, or as --output ends)")
    extensions: tuple[str, ...] | None = option(None, "only files with these endings, e.g. .svs .ndpi", metavar="EXT")
    keep_structure: bool = option(False, "keep the subfolders of --input_dir in --output_dir")
    slides_csv: Path | None = slides_csv_option()
    slide_mpp: float | None = slide_mpp_option()
    write_slides_csv: Path | None = option(
        None, "write a table for --slides_csv with each slide's own values, then stop", metavar="FILE"
    )
    save_tissue: bool = option(False, "write each slide's tissue to tissue/<slide>.geojson, for editing in QuPath")
    tissue: Path | None = option(
        None,
        "folder of <slide>.geojson with tissue outlines, drawn or edited in QuPath; on slides without a file the "
        "tissue is detected",
        metavar="DIR",
    )
    tissue_strict: bool = option(False, "fail a slide without a file in --tissue, instead of detecting its tissue")
    tissue_classes: tuple[str, ...] | None = option(
        None, "take only outlines of these classes in --tissue, such as Tumor (default: all)", metavar="CLASS"
    )
    preview: bool | None = option(
        None,
        "draw each slide's tissue and patches in previews/, and contact_sheet.html (default: for a folder)",
    )
    limit: int | None = option(None, "extract only the first N slides, to try a recipe", least=1, metavar="N")
    shard: str | None = option(
        None, "extract the i-th of n parts, for array jobs: every n-th slide, largest first", metavar="i/n"
    )
    overwrite: bool = option(False, "replace feature files that were made with another recipe")
    dry_run: bool = option(False, "print what would be extracted, and its time and disk space, then stop")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.input is None) == (self.input_dir is None):
            raise ConfigError("give exactly one of --input (one slide) and --input_dir (a folder of slides)")
        if self.input_dir is not None and self.output_dir is None and self.write_slides_csv is None:
            raise ConfigError("--input_dir needs --output_dir, the folder for the feature files")
        if self.input_dir is not None and self.output is not None:
            raise ConfigError("--output names one file and goes with --input; give --output_dir with --input_dir")
        if self.output is not None and self.output_dir is not None:
            raise ConfigError("give one of --output (a file) and --output_dir (a folder)")
        if self.tissue is not None and self.save_tissue:
            raise ConfigError("--save_tissue writes what the detector finds, which --tissue replaces; give one of them")
        for name in ("tissue_strict", "tissue_classes"):
            if self.tissue is None and getattr(self, name):
                raise ConfigError(
                    f"--{name} goes with --tissue, the folder of outlines; give it, or leave --{name} out"
                )
        for name in ("limit", "shard"):
            if self.write_slides_csv is not None and getattr(self, name):
                raise ConfigError(f"--{name}: --write_slides_csv writes a row of each slide; leave --{name} out")
        for name in ("limit", "extensions", "shard", "keep_structure"):
            if self.input is not None and getattr(self, name):
                raise ConfigError(f"--{name} goes with --input_dir; leave it out with --input")
        _ = self.shard_number
        if self.output is not None and self.format not in (None, self.output.suffix[1:]):
            raise ConfigError(f"--output {self.output}: does not end in --format {self.format}; leave --format out")
        if self.output is not None and self.output.suffix not in (".h5", ".pt"):
            raise ConfigError(f"--output {self.output}: ends in {self.output.suffix!r}; end it in .h5 or .pt")

    @property
    def shard_number(self) -> tuple[int, int]:
        """The number of the shard, from 1, and the number of shards."""
        if self.shard is None:
            return 1, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        index, count = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= index <= count:
            raise ConfigError(f"--shard {self.shard}: give i/n, such as 1/8 to 8/8")
        return index, count
