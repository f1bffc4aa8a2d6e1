"""The files of a cohort, and how a slide is fed to a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.core.errors import ConfigError
from utils.core.settings import REQUIRED, Settings, option

BatchSize = int | Literal["auto"]
CHUNK_SIZE = 1000  # patches in a chunk at most, by default


def batch_size_option() -> Any:
    """Return the field of a settings class for the chunks per training step."""
    return option("auto", "chunks (or whole slides) per step; auto: 128, or fewer for 8 steps per epoch", least=1)


@dataclass(frozen=True, kw_only=True)
class CohortFiles(Settings):
    """Where a cohort's slides and labels are."""

    features_dir: Path | None = option(None, "folder of feature files (default: datasets/<dataset>/features)")
    labels_csv: Path | None = option(None, "table case_id,wsi_id,label (default: datasets/<dataset>/labels.csv)")
    class_names: tuple[str, ...] | None = option(
        None,
        "classes in order, the positive one last (default: those of a public cohort, else the labels: sorted, of two "
        "the rarer one last)",
        metavar="NAME",
    )
    feat_type: str = option("features", "name of the features inside each file")
    no_patients: bool = option(False, "treat each slide as a patient of its own if the table names no patients")
    allow: tuple[Literal["missing", "unknown", "duplicate", "spelling"], ...] = option(
        (),
        "leave out rows without a feature file (missing), with a label that is no class (unknown), or with a repeated "
        "wsi_id (duplicate); treat patients whose names hardly differ as different (spelling)",
    )
    group_column: str | None = option(
        None,
        "column whose groups are never split, such as site (default: the patient; site is read from TCGA barcodes)",
    )


@dataclass(frozen=True, kw_only=True)
class Cohort(CohortFiles):
    """The slides, their labels, and how a slide is fed to a model."""

    dataset: str = option(
        REQUIRED, "name of the cohort; names the default folders datasets/<name> and outputs/<mil>/<name>"
    )
    positive_class: str | None = option(
        None,
        "of two classes the positive one, whose AUC, average precision and threshold are given (default: the last of "
        "--class_names or of a public cohort, else the rarer one)",
        metavar="NAME",
    )
    mode: Literal["chunked", "full"] = option("chunked", "train on chunks of a slide, or on whole slides")
    chunk_size: int = option(CHUNK_SIZE, "most patches in a chunk", least=1)
    sequential: bool = option(False, "make chunks of consecutive patches in the file, not of random ones")
    cache: str | None = option(
        None,
        "off, ram, or a folder for one packed file that all runs share "
        "(default: ram if the cohort fits in a quarter of the free memory, else off)",
        metavar="off|ram|DIR",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequential and self.mode == "full":
            raise ConfigError("--sequential: whole slides are not cut; leave it out, or give --mode chunked")
