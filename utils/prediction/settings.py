"""The settings of `predict.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.core.errors import ConfigError
from utils.core.settings import FigureFormat, Settings, figure_format_option, option
from utils.features.settings import Extraction
from utils.slides.settings import slide_mpp_option, slides_csv_option


@dataclass(frozen=True, kw_only=True)
class Prediction(Settings):
    """The models, inputs and outputs of `predict.py`."""

    checkpoint: tuple[Path, ...] = option(
        (),
        "trained model (.pth), which holds architecture, classes and recipe, or the folder of a training run, for its "
        "selected model; the predictions of several are averaged",
        metavar="FILE|RUN",
        one_of="models",
    )
    out_of_fold: Path | None = option(
        None,
        "instead of --checkpoint, the folder of a training run: each slide of its cohort is predicted by the model "
        "whose fold did not see it",
        metavar="RUN",
        one_of="models",
    )
    repeat: int | None = option(None, "the repeat of --out_of_fold to use (default: the first)", least=1, metavar="N")
    input: Path | None = option(
        None, "feature file (.h5, .pt, .pth) or raw slide; give this or --input_dir", one_of="slides"
    )
    input_dir: Path | None = option(
        None,
        "a folder of feature files or, if it has none, of slides; give this or --input (with --out_of_fold: the folder "
        "of the features, if they have moved since the run)",
        one_of="slides",
    )
    extensions: tuple[str, ...] | None = option(
        None, "only slides of --input_dir with these endings, e.g. .svs .ndpi", metavar="EXT"
    )
    labels_csv: Path | None = option(
        None, "table case_id,wsi_id,label, to score the predictions of --input_dir, as for an external cohort"
    )
    cases_csv: Path | None = option(
        None,
        "table case_id,wsi_id of which slides of --input_dir are one patient's, for a model that was trained with "
        "--unit case (default: as --labels_csv says)",
    )
    allow: tuple[Literal["missing", "unknown", "duplicate"], ...] = option(
        (),
        "leave out rows of --labels_csv without a slide (missing), with a label that is no class (unknown), or with a "
        "repeated wsi_id (duplicate); with --out_of_fold, slides without features (missing)",
    )
    group_column: str | None = option(
        None,
        "column of --labels_csv, such as site, over whose groups the intervals of the scores are computed (default: "
        "over patients; site is read from TCGA barcodes)",
    )
    subgroups: str | None = option(
        None, "columns of --labels_csv, such as sex,site: the scores of each group of slides", metavar="A,B,C"
    )
    output_dir: Path | None = option(
        None, "folder for the results (default: outputs/inference/<model>_<dataset>)", alias="--output"
    )
    overwrite: bool = option(
        False, "overwrite existing predictions made by another model, with other settings or from another input"
    )
    prevalence: float | None = option(
        None,
        "share of the positive class among such slides where the model is used: calibrated probabilities refer to it "
        "(default: that of the training cohort)",
        least=0.0001,
        most=0.9999,
        metavar="SHARE",
    )
    mode: Literal["full", "chunked"] | None = option(
        None, "how the slide is fed (default: as in the model's evaluation)"
    )
    chunk_size: int | None = option(None, "patches per chunk at most (default: as in the model's evaluation)", least=1)
    feat_type: str = option("features", "name of the features inside the file")
    faithfulness: bool = option(
        False, "measure whether the attention matters: remove and add patches in its order, and in random ones"
    )
    annotations: Path | None = option(
        None,
        "score attention and evidence against what is annotated: a QuPath GeoJSON file, a folder of <slide>.geojson, "
        "or inst_labels, the labels of patches in the feature files",
        metavar="FILE|DIR|inst_labels",
    )
    annotation_class: tuple[str, ...] = option(
        (),
        "the class of the model that a class of --annotations, or a number of inst_labels, stands for, such as "
        "Tumor=malignant (default: the class of the same name; of two classes 1 is the last; of several labels none)",
        metavar="NAME=CLASS",
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "tf32", "fp32"] = option(
        "auto",
        "precision of the models' products, not of a raw slide's backbone; auto: tf32 on a CUDA device that has it, "
        "fp32 elsewhere",
    )
    figure_format: tuple[FigureFormat, ...] = figure_format_option()
    allow_mismatch: bool = option(False, "predict even if the features were made with another recipe than the model's")
    # The checkpoint holds these, except some of the first version's; a flag that contradicts it is an error.
    mil: str | None = option(
        None,
        "the model that the checkpoint must hold; other people's code (path/to/file.py:Class or package.module:Class) "
        "runs only if it is named here",
        metavar="MODEL",
    )
    dataset: str | None = option(
        None,
        "cohort the checkpoint must have been trained on; gives the classes if a checkpoint of the first version "
        "does not",
        hidden=True,
    )
    input_dim: int | None = option(None, "feature width the checkpoint must take", least=1, hidden=True)
    num_heads: int | None = option(
        None, "attention heads of a checkpoint of the first version, which does not record them (default 4)", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out_of_fold is not None:
            self._check_out_of_fold()
        elif self.repeat is not None:
            raise ConfigError(f"--repeat {self.repeat}: goes with --out_of_fold; leave it out")
        elif not self.checkpoint:
            raise ConfigError(
                "give --checkpoint (a trained model, or a training run) or --out_of_fold (a training run)"
            )
        elif (self.input is None) == (self.input_dir is None):
            raise ConfigError(
                "give exactly one of --input (a feature file or slide) and --input_dir (a folder of them)"
            )
        for name in ("labels_csv", "cases_csv", "extensions"):
            if self.input is not None and getattr(self, name):
                raise ConfigError(f"--{name} goes with --input_dir; leave it out with --input")
        if self.annotation_class and self.annotations is None:
            raise ConfigError(
                f"--annotation_class {' '.join(self.annotation_class)}: goes with --annotations; give it, or leave "
                "--annotation_class out"
            )
        for name in ("group_column", "subgroups"):
            column = getattr(self, name)
            if column is not None and self.labels_csv is None:
                raise ConfigError(f"--{name} {column}: is a column of --labels_csv; give it, or leave --{name} out")
        if self.allow and self.out_of_fold is None and (self.labels_csv or self.cases_csv) is None:
            raise ConfigError(
                f"--allow {' '.join(self.allow)}: is about rows of --labels_csv; give it, or leave --allow out"
            )

    def _check_out_of_fold(self) -> None:
        """Raise ConfigError for flags that contradict a run, which has its own models, slides and labels."""
        for name in ("checkpoint", "input", "labels_csv", "cases_csv", "extensions"):
            if getattr(self, name):
                raise ConfigError(
                    f"--out_of_fold {self.out_of_fold}: knows its models, slides and labels; leave --{name} out"
                )
        for_labels = [word for word in self.allow if word != "missing"]
        if for_labels:
            raise ConfigError(
                f"--allow {' '.join(for_labels)}: goes with --labels_csv; leave it out with --out_of_fold"
            )


@dataclass(frozen=True, kw_only=True)
class PredictionRecipe(Settings):
    """How raw slides are extracted; if the recipe of the training features is recorded, these must agree with it, but
    for those that choose the patches.
    """

    backbone: str | None = option(None, "backbone, if the checkpoint records none")
    weights: Path | None = option(None, "local weights of the backbone instead of a download")
    patch_size: int | None = option(None, "patch edge in pixels, at --level or --mpp", least=1)
    stride: int | None = option(None, "distance between patch corners, in pixels at the resolution read", least=1)
    level: int | None = option(None, "pyramid level to read", least=0)
    mpp: float | None = option(None, "um per pixel of the patches", least=0.05, most=40)
    tissue_threshold: float | None = option(None, "least fraction of tissue in a patch", least=0, most=1)
    slides_csv: Path | None = slides_csv_option()
    slide_mpp: float | None = slide_mpp_option()
    batch_size: int = option(Extraction.batch_size, "patches per forward pass", least=1)
    save_features: bool = option(False, "keep the features as <output_dir>/<slide>.h5")
