"""The settings of `train.py`: the model, its training, cross-validation, and how a run is done."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.bags.settings import BatchSize, batch_size_option, names_in
from utils.core.errors import ConfigError
from utils.core.settings import REQUIRED, SEED, FigureFormat, Settings, figure_format_option, option
from utils.tasks.operating_point import BALANCED, OperatingPoint


@dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """The model. A hyperparameter that is not given has the model's default; one that the model lacks is an error."""

    mil: str = option(
        REQUIRED,
        "LiteMIL, ABMIL, ABMIL_Multihead (or MADMIL), TransMIL, meanPool or maxPool; or a class of other people, an "
        "nn.Module: path/to/file.py:Class or package.module:Class (docs/own_model.md)",
        metavar="MODEL",
    )
    mil_args: tuple[str, ...] = option(
        (), "hyperparameters of the model, those of other people's too, such as hidden=64", metavar="NAME=VALUE"
    )
    input_dim: int | None = option(None, "feature width (default: that of the features)", least=1, hidden=True)
    hidden_dim: int | None = option(None, "hidden width", least=1, most=65536)
    num_heads: int | None = option(None, "attention heads", least=1, most=65536)
    num_queries: int | None = option(None, "learnable queries", least=1, most=65536)
    attention_dim: int | None = option(None, "width of the attention's hidden layer", least=1, most=65536)
    gated: bool | None = option(None, "gate the attention by a second, sigmoid branch")
    dropout: float | None = option(None, "dropout probability", least=0, most=1)

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters that were given as flags of their own."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        others = ("mil", "mil_args", "input_dim")
        return {name: value for name, value in values.items() if name not in others and value is not None}


@dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """How one model is trained."""

    epochs: int = option(100, "maximum number of epochs", least=1)
    patience: int = option(
        10, "stop after so many epochs without better validation at slide level, where the best epoch is kept", least=1
    )
    least_steps: int = option(
        400, "optimiser steps before which no epoch is kept and no training stops, unless it is the last epoch", least=0
    )
    batch_size: BatchSize = batch_size_option()
    lr: float = option(1e-3, "peak learning rate of AdamW", least=1e-8, most=1)
    weight_decay: float = option(0.01, "weight decay of AdamW", least=0, most=10)
    warmup_epochs: int = option(
        5, "epochs in which the learning rate rises, at most a quarter of --epochs; a cosine follows", least=0
    )
    final_lr: float = option(1e-6, "learning rate at the end of the cosine", least=0, most=1)
    clip_norm: float = option(1.0, "maximum norm of the gradient", least=1e-12)
    class_weights: Literal["balanced", "none"] = option(
        "balanced", "weights of the loss: each class weighs the same in all (balanced), or each slide does (none)"
    )
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = option(
        "auto",
        "precision of training; auto: bf16 on a CUDA device that has it, else fp16; fp32 on other devices. On a CUDA "
        "device products of float32 numbers are in TF32, but with fp32",
    )
    use_amp: bool = option(True, "the same as --precision fp32", flag="--no_amp", hidden=True)
    standardize: Literal["auto", "on", "off"] = option(
        "auto",
        "standardise each feature over the training slides, as a part of the model; auto: if the features' scale is "
        "far from what models are initialised for, such as 1e4 times larger or L2-normalised",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_amp and self.precision not in ("auto", "fp32"):
            raise ConfigError(f"--precision {self.precision}: contradicts --no_amp; leave one of them out")

    @property
    def warmup(self) -> int:
        """Return the epochs of the warm-up, which is shorter in a short training."""
        return min(self.warmup_epochs, self.epochs // 4)

    @property
    def amp_precision(self) -> str:
        """Return the precision, from --precision or --no_amp."""
        return self.precision if self.use_amp else "fp32"


Keep = Literal["auto", "last", "best"]
Monitor = Literal[
    "auto", "slide_loss", "slide_auc", "slide_balanced_accuracy", "slide_f1_macro", "slide_r2", "slide_mae",
    "slide_spearman", "slide_pearson", "slide_integrated_brier", "slide_c_index", "slide_c_index_ipcw",
    "slide_quadratic_kappa", "slide_average_precision",
]  # fmt: skip
Final = Literal["best", "ensemble", "refit", "all"]


@dataclass(frozen=True, kw_only=True)
class Protocol(Settings):
    """Nested cross-validation."""

    n_outer: int = option(5, "outer folds: each slide is tested once", least=2)
    n_inner: int = option(4, "inner folds: they select setting and model, and the epoch where it is chosen", least=2)
    repeats: int = option(1, "how often the whole cross-validation is repeated, on other folds", least=1)
    splits: Path | None = option(
        None,
        "take the folds from a file: our splits.json, a splits_<k>.csv of CLAM, or a folder of those",
        metavar="FILE|DIR",
    )
    grid: str | None = option(
        None,
        'settings to select from in the inner loop, such as "lr=1e-4,3e-4 hidden_dim=128,256": any hyperparameters of '
        "training or model; they override the flags",
        metavar="NAME=V,V...",
    )
    monitor: Monitor = option(
        "auto",
        "metric of the inner validation that selects setting and model, and the epoch where the best is kept; auto: "
        "the AUC of classes and labels, else the loss",
        also={name.removeprefix("slide_"): name for name in typing.get_args(Monitor)},
    )
    keep: Keep = option(
        "auto",
        "the epoch of a training that is kept: the last, or the best by validation; auto: the last if an inner fold "
        "validates on fewer than 20 slides of a class, else the best",
    )
    operating_point: str = option(
        BALANCED,
        "what the decision threshold of two classes is fitted for, on inner validation: the best balanced accuracy, or "
        "a wanted rate of the positive class, such as sensitivity=0.95 or specificity=0.9",
        metavar="balanced_accuracy|sensitivity=S|specificity=S",
    )
    final: Final = option(
        "ensemble",
        "the model that is tested: the mean of the inner models of the selected setting (ensemble), the best of them, "
        "or one trained again on the whole outer training set for the median kept epoch (refit); all: as best, and one "
        "more model is trained on all slides, for use elsewhere (all_slides.pth)",
    )
    seed: int = option(SEED, "seed of splits, weights and batches", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            OperatingPoint.of(self.operating_point)
        except ValueError as error:
            raise ConfigError(f"--operating_point {self.operating_point}: expected {error}") from None
        if self.splits is not None and self.repeats > 1:
            raise ConfigError(f"--repeats {self.repeats}: --splits {self.splits} says which folds there are; drop one")


@dataclass(frozen=True, kw_only=True)
class Running(Settings):
    """Where and how a run is done; it changes results at most by rounding."""

    output_dir: Path | None = option(
        None, "folder for the results (default: outputs/<mil>/<dataset>, or <dataset>_<task>)"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    jobs: int = option(1, "trainings in parallel, each in its own process with its share of the threads", least=1)
    deterministic: bool = option(
        False,
        "on a CUDA device, compute by algorithms that give the same bytes again, which is slower; a CPU always does",
    )
    figure_format: tuple[FigureFormat, ...] = figure_format_option()


@dataclass(frozen=True, kw_only=True)
class Analyses(Settings):
    """What is computed from the predictions of a run, also of a finished one; nothing is trained for it."""

    covariates: str | None = option(
        None,
        "columns of the label table that describe patients, such as age,sex: on the same folds, a plain model of these "
        "alone is compared with the slides alone and with both",
        metavar="A,B,C",
    )
    subgroups: str | None = option(
        None,
        "columns of the label table, such as sex,site: figures of each group of slides",
        metavar="A,B,C",
    )

    def columns(self, flag: str) -> tuple[str, ...]:
        """Return the columns that a flag names. Raise ConfigError for an empty name."""
        text = getattr(self, flag)
        return () if text is None else names_in(flag, text)


# What `--preset` sets, unless another flag does.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "epochs": 100, "patience": 10, "least_steps": 0, "batch_size": 128, "lr": 1e-4, "weight_decay": 0.01,
        "warmup_epochs": 5, "final_lr": 1e-6, "clip_norm": 1.0, "class_weights": "balanced", "standardize": "off",
        "n_outer": 5, "n_inner": 4, "keep": "best", "final": "best",
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preset(Settings):
    """Settings that are set together."""

    preset: Literal["paper"] | None = option(
        None, "train as the first version did: its value for each setting of training that no other flag gives"
    )


def preset_record(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what run.json says of a preset: its name, and the settings whose values are not those of the preset."""
    changed = {setting: settings[setting] for setting, value in PRESETS[name].items() if settings[setting] != value}
    return {"name": name, "changed": changed}


@dataclass(frozen=True, kw_only=True)
class DryRun(Settings):
    """What `train.py` does instead of training."""

    dry_run: bool = option(
        False, "audit the cohort, show the folds, estimate disk, memory and time from a short trial, then stop"
    )
