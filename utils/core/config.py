"""Every setting and its default, once. The command line is made from these classes (`core/cli.py`).

A field made with `option` is also a flag; its help, limits and other spellings stand beside its default. Values of
another type, unknown words and numbers out of range raise ConfigError naming the flag, the value and what is expected,
whether they come from a command line or from Python.
"""

import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from utils.core.errors import ConfigError, meant

REQUIRED: Any = dataclasses.MISSING


def option(
    default: Any,
    help: str,  # noqa: A002 - argparse's own word
    *,
    least: float = -math.inf,
    most: float = math.inf,
    flag: str | None = None,
    alias: str | None = None,
    metavar: str | None = None,
    positional: bool = False,
    one_of: str | None = None,
    also: Mapping[str, str] | None = None,
    hidden: bool = False,
) -> Any:
    """A dataclass field that is also a flag. `default=REQUIRED` makes the flag mandatory; a `positional` one is given
    by its place, not by a name. Of the flags that share a name in `one_of`, one has to be given. `also` maps other
    words for a choice to the choice. A `hidden` flag works and is not in the help text.
    """
    metadata = {
        "help": help, "least": least, "most": most, "flag": flag, "alias": alias, "metavar": metavar,
        "positional": positional, "one_of": one_of, "also": also or {}, "hidden": hidden,
    }  # fmt: skip
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field) -> str:
    """The name a person knows the field by."""
    if field.metadata.get("positional"):
        return field.metadata["metavar"] or field.name
    return field.metadata.get("flag") or f"--{field.name}"


_EXPECTED = {bool: "True or False", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_EXPECTED_LISTS = {str: "a list of text", Path: "a list of paths"}


def converted(kind: Any, value: Any, also: Iterable[str] = ()) -> Any:
    """Return `value` as the type `kind` of a setting: NumPy's numbers become Python's, text becomes a path, a list a
    tuple. Raises ValueError, which says what is expected, where that would change what was meant; `also` holds what
    may have been meant besides the words of `kind`.
    """
    if getattr(value, "shape", None) == ():  # a number of NumPy or PyTorch
        value = value.item()
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _converted_to_one_of(parts, value)
    if origin is Literal:
        if isinstance(value, str) and value in parts:
            return value
        raise ValueError(f"one of {', '.join(parts)}{meant(str(value), [*also, *parts])}")
    if origin is tuple:
        if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping):
            raise ValueError(_EXPECTED_LISTS.get(parts[0], "a list of words"))
        if isinstance(value, set | frozenset) and parts[0] in _EXPECTED_LISTS:
            raise ValueError(f"{_EXPECTED_LISTS[parts[0]]}, whose order counts: a set has none")
        try:
            return tuple(converted(parts[0], item) for item in value)
        except ValueError as error:
            raise ValueError(_EXPECTED_LISTS.get(parts[0], str(error))) from None
    fitting: tuple[type, ...] = {float: (int, float), Path: (str, os.PathLike)}.get(kind, (kind,))
    if not isinstance(value, fitting) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(_EXPECTED[kind])
    return value if kind is float else kind(value)


def _converted_to_one_of(kinds: Iterable[Any], value: Any) -> Any:
    expected = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return converted(kind, value)
            except ValueError as error:
                expected.append(str(error))
        elif value is None:
            return None
    raise ValueError(" or ".join(expected))


def checked(field: dataclasses.Field, kind: Any, value: Any, name: str) -> Any:
    """Return the value of a setting in its type, once it is known to be one of its words or within its limits. Raises
    ConfigError, which begins with `name` and the value.
    """
    also = field.metadata["also"]
    try:
        value = converted(kind, also.get(value, value) if isinstance(value, str) else value, also)
    except ValueError as error:
        raise ConfigError(f"{name}{value!r}: expected {error}") from None
    if value == () and field.default not in ((), REQUIRED):
        raise ConfigError(f"{name}is empty; give at least one, or leave it out")
    least, most = field.metadata["least"], field.metadata["most"]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not (math.isfinite(value) and least <= value <= most):
        limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ConfigError(f"{name}{value}: out of range; give a number {limits}")
    return value


def check_names(owner: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise ConfigError, with the nearest known name, where a setting is none."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"{owner}: no setting {', '.join(unknown)}{meant(unknown[0], known)}")


@functools.cache
def kinds_of(config: type) -> dict[str, Any]:
    """Return the type of each setting of a config class."""
    return typing.get_type_hints(config)


def check_setting(config: type, name: str, value: Any) -> Any:
    """Return `value` as the setting `name` of a config class takes it. Raises ConfigError where it does not."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    return checked(field, kinds_of(config)[name], value, f"{flag_of(field)} ")


class _Checked:
    """Checks names, types, words and limits of its settings when the dataclass is made."""

    def __new__(cls, **settings: Any) -> Self:
        check_names(cls.__name__, settings, [field.name for field in dataclasses.fields(cls)])  # type: ignore[arg-type]
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.metadata:
                value = check_setting(type(self), field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, value)


FigureFormat = Literal["png", "pdf", "svg"]


def _figure_format() -> Any:
    return option(("png",), "file format of the figures, one or several of png, pdf and svg (default: png)")


@dataclass(frozen=True, kw_only=True)
class Extraction(_Checked):
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


@dataclass(frozen=True, kw_only=True)
class ExtractionFiles(_Checked):
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
    slides_csv: Path | None = option(
        None, "table wsi,mpp: the um per level-0 pixel of slides whose own is missing or wrong"
    )
    slide_mpp: float | None = option(
        None, "um per level-0 pixel of all slides, but for those in --slides_csv", least=0.05, most=40
    )
    write_slides_csv: Path | None = option(
        None, "write a table for --slides_csv, with what each slide says itself, then stop", metavar="FILE"
    )
    save_tissue: bool = option(False, "write each slide's tissue to tissue/<slide>.geojson, which QuPath edits")
    tissue: Path | None = option(
        None,
        "folder of <slide>.geojson, drawn or edited in QuPath, that say where the tissue is; the detector looks at "
        "slides without one",
        metavar="DIR",
    )
    tissue_strict: bool = option(False, "a slide without a file in --tissue fails, instead of being detected")
    tissue_classes: tuple[str, ...] | None = option(
        None, "only the areas of these classes of --tissue are tissue, such as Tumor (default: all)", metavar="CLASS"
    )
    preview: bool | None = option(
        None,
        "a picture of each slide's tissue and patches, in previews/, and contact_sheet.html (default: of a folder)",
    )
    limit: int | None = option(None, "only the first N slides, to try a recipe on a subset", least=1, metavar="N")
    shard: str | None = option(
        None, "the i-th of n parts of the slides, for array jobs: every n-th slide, largest first", metavar="i/n"
    )
    overwrite: bool = option(False, "replace feature files that were made with another recipe")
    dry_run: bool = option(False, "say what would be extracted, and what it would cost, then stop")

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
        _ = self.part
        if self.output is not None and self.format not in (None, self.output.suffix[1:]):
            raise ConfigError(f"--output {self.output}: does not end in --format {self.format}; leave --format out")
        if self.output is not None and self.output.suffix not in (".h5", ".pt"):
            raise ConfigError(f"--output {self.output}: ends in {self.output.suffix!r}; end it in .h5 or .pt")

    @property
    def part(self) -> tuple[int, int]:
        """The number of the shard, from 1, and of how many."""
        if self.shard is None:
            return 1, 1
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        index, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= index <= count:
            raise ConfigError(f"--shard {self.shard}: give i/n, such as 1/8 to 8/8")
        return index, count


@dataclass(frozen=True, kw_only=True)
class CohortFiles(_Checked):
    """Where a cohort's slides and labels are."""

    features_dir: Path | None = option(None, "folder of feature files (default: datasets/<dataset>/features)")
    labels_csv: Path | None = option(None, "table case_id,wsi_id,label (default: datasets/<dataset>/labels.csv)")
    class_names: tuple[str, ...] | None = option(
        None,
        "classes in order, the positive one last (default: the known cohort's, else the labels sorted)",
        metavar="NAME",
    )
    feat_type: str = option("features", "name of the features inside each file")
    no_patients: bool = option(False, "take each slide as a patient of its own, where the table names no patients")
    allow: tuple[Literal["missing", "unknown", "duplicate", "spelling"], ...] = option(
        (),
        "leave out rows without a feature file (missing), with a label that is no class (unknown), or that repeat a "
        "wsi_id (duplicate); take patients whose names hardly differ as several (spelling)",
    )
    group_column: str | None = option(
        None,
        "column whose values no split divides, such as site (default: the patient; site is read off TCGA barcodes)",
    )


@dataclass(frozen=True, kw_only=True)
class Cohort(CohortFiles):
    """The slides, their labels, and how a slide is fed to a model."""

    dataset: str = option(
        REQUIRED, "name of the cohort; names the default folders datasets/<name> and outputs/<mil>/<name>"
    )
    mode: Literal["chunked", "full"] = option("chunked", "train on chunks of a slide, or on whole slides")
    chunk_size: int = option(1000, "most patches in a chunk", least=1)
    sequential: bool = option(False, "cut slides into runs of patches that are neighbours in the file, not at random")
    cache: str | None = option(
        None,
        "off, ram, or a folder for one packed file that all runs share "
        "(default: ram where the cohort fits a quarter of the free memory, else off)",
        metavar="off|ram|DIR",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequential and self.mode == "full":
            raise ConfigError("--sequential: whole slides are not cut; leave it out, or give --mode chunked")


@dataclass(frozen=True, kw_only=True)
class Model(_Checked):
    """Which model; a hyperparameter that is not given is the model's own default, one that it lacks is an error."""

    mil: str = option(
        REQUIRED, "LiteMIL, ABMIL, ABMIL_Multihead (or MADMIL), TransMIL, meanPool or maxPool", metavar="MODEL"
    )
    input_dim: int | None = option(None, "feature width (default: read off the features)", least=1, hidden=True)
    hidden_dim: int | None = option(None, "hidden width", least=1, most=65536)
    num_heads: int | None = option(None, "attention heads", least=1, most=65536)
    num_queries: int | None = option(None, "learnable queries", least=1, most=65536)
    attention_dim: int | None = option(None, "width of the attention's hidden layer", least=1, most=65536)
    gated: bool | None = option(None, "gate the attention by a second, sigmoid branch")
    dropout: float | None = option(None, "dropout probability", least=0, most=1)

    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters that were given."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in ("mil", "input_dim") and value is not None}


@dataclass(frozen=True, kw_only=True)
class Training(_Checked):
    """One training."""

    epochs: int = option(100, "most epochs of a training", least=1)
    patience: int = option(10, "stop after so many epochs without a better slide-level validation", least=1)
    batch_size: int | Literal["auto"] = option(
        "auto", "chunks (or whole slides) per step; auto: 128, or so few that an epoch has 8 steps", least=1
    )
    lr: float = option(1e-4, "peak learning rate of AdamW", least=1e-8, most=1)
    weight_decay: float = option(0.01, "weight decay of AdamW", least=0, most=10)
    warmup_epochs: int = option(
        5, "epochs in which the learning rate rises, a quarter of --epochs at the most; then a cosine", least=0
    )
    final_lr: float = option(1e-6, "learning rate at the cosine's end", least=0, most=1)
    clip_norm: float = option(1.0, "greatest norm of a step's gradient", least=1e-12)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "of training: auto is bf16 on a CUDA device that has it, else fp16 there; fp32 elsewhere"
    )
    use_amp: bool = option(True, "the same as --precision fp32", flag="--no_amp", hidden=True)
    standardize: Literal["auto", "on", "off"] = option(
        "auto",
        "standardise each feature over a training's slides, as a part of the model; auto: where the features' scale is "
        "far from what models are initialised for, such as 1e4 times larger or L2-normalised",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_amp and self.precision not in ("auto", "fp32"):
            raise ConfigError(f"--precision {self.precision}: contradicts --no_amp; leave one of them out")

    @property
    def amp_precision(self) -> str:
        """`precision`, both ways of giving it considered."""
        return self.precision if self.use_amp else "fp32"


Monitor = Literal["slide_auc", "slide_loss", "slide_balanced_accuracy", "slide_f1_macro"]
Final = Literal["best", "ensemble", "refit"]


@dataclass(frozen=True, kw_only=True)
class Protocol(_Checked):
    """Nested cross-validation."""

    n_outer: int = option(5, "outer folds: each slide is tested once", least=2)
    n_inner: int = option(4, "inner folds: they choose epoch, setting and model", least=2)
    repeats: int = option(1, "how often the whole is repeated, on other folds", least=1)
    splits: Path | None = option(
        None,
        "take the folds from a file: our splits.json, or a splits_<k>.csv of CLAM, or a folder of those",
        metavar="FILE|DIR",
    )
    grid: str | None = option(
        None,
        'settings to choose from in the inner loop, such as "lr=1e-4,3e-4 hidden_dim=128,256": any hyperparameter of '
        "training or model; they take the place of the flags",
        metavar="NAME=V,V...",
    )
    monitor: Monitor = option(
        "slide_auc",
        "what inner validation compares epochs, settings and models by",
        also={name.removeprefix("slide_"): name for name in typing.get_args(Monitor)},
    )
    final: Final = option(
        "best",
        "the model that is tested: the best inner one of the chosen setting, the mean of its inner models (ensemble), "
        "or one trained anew on the whole outer training set for the median best epoch (refit)",
    )
    seed: int = option(42, "seed of splits, weights and batches", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.splits is not None and self.repeats > 1:
            raise ConfigError(f"--repeats {self.repeats}: --splits {self.splits} says which folds there are; drop one")


@dataclass(frozen=True, kw_only=True)
class Running(_Checked):
    """Where and how a run is done; no number depends on it but by rounding."""

    output_dir: Path | None = option(None, "results (default: outputs/<mil>/<dataset>)")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    jobs: int = option(1, "trainings side by side, each in a process of its own with its share of the threads", least=1)
    figure_format: tuple[FigureFormat, ...] = _figure_format()


def _is_address(text: str) -> bool:
    try:
        there = urlsplit(f"//{text}")
        return bool(there.hostname and there.port) and there.netloc == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Cluster(_Checked):
    """Whether the work is handed to Ray; no number depends on it but by rounding."""

    ray: str | None = option(
        None,
        "hand the work to Ray: local starts it on this machine, auto joins the cluster this machine belongs to, or its "
        "head's address",
        metavar="local|auto|HOST:PORT",
    )
    actors: int | None = option(
        None,
        "workers on Ray (default: one per GPU, or per as many processors as this process has threads); more than GPUs "
        "share them",
        least=1,
    )
    retries: int | None = option(
        None, "on Ray, how often a task whose worker died is done again by another (default: 2)", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("actors", "retries"):
            if self.ray is None and (value := getattr(self, name)) is not None:
                raise ConfigError(f"--{name} {value}: goes with --ray; give --ray local, auto or HOST:PORT")
        if self.ray not in (None, "local", "auto") and not _is_address(self.ray):
            raise ConfigError(f"--ray {self.ray}: neither local nor auto; of a cluster's head give HOST:PORT")

    @property
    def is_asked_for(self) -> bool:
        return self.ray is not None


@dataclass(frozen=True, kw_only=True)
class Rehearsal(_Checked):
    """What `train.py` does instead of training."""

    dry_run: bool = option(
        False, "audit the cohort, show the folds, estimate disk, memory and time from a short trial, then stop"
    )


@dataclass(frozen=True, kw_only=True)
class Prediction(_Checked):
    """What `predict.py` predicts, with which models, and where it writes."""

    checkpoint: tuple[Path, ...] = option(
        (),
        "trained model (.pth), which says architecture, classes and recipe, or the folder of a training run, whose "
        "chosen model is taken; several answer as their mean",
        metavar="FILE|RUN",
        one_of="models",
    )
    out_of_fold: Path | None = option(
        None,
        "instead of --checkpoint, the folder of a training run: each slide of its cohort is predicted by the model of "
        "the fold that did not see it",
        metavar="RUN",
        one_of="models",
    )
    repeat: int | None = option(
        None, "of the repeats of --out_of_fold, take this one (default: the first)", least=1, metavar="N"
    )
    input: Path | None = option(
        None, "feature file (.h5, .pt, .pth) or raw slide; give this or --input_dir", one_of="slides"
    )
    input_dir: Path | None = option(
        None,
        "a folder of feature files or, where it holds none, of slides; give this or --input (with "
        "--out_of_fold: where the features are, if not where the run found them)",
        one_of="slides",
    )
    extensions: tuple[str, ...] | None = option(
        None, "of --input_dir, only slides with these endings, e.g. .svs .ndpi", metavar="EXT"
    )
    labels_csv: Path | None = option(
        None, "table case_id,wsi_id,label: the predictions of --input_dir are scored, as on an external cohort"
    )
    allow: tuple[Literal["missing", "unknown", "duplicate"], ...] = option(
        (),
        "leave out rows of --labels_csv without a slide, with a label that is no class, or that repeat a wsi_id; of "
        "--out_of_fold slides without features (missing)",
    )
    output_dir: Path | None = option(
        None, "where the results go (default: outputs/inference/<model>_<dataset>)", alias="--output"
    )
    overwrite: bool = option(
        False, "overwrite existing predictions made by another model, with other settings or from another input"
    )
    mode: Literal["full", "chunked"] | None = option(
        None, "how the slide is fed (default: as in the model's evaluation)"
    )
    chunk_size: int | None = option(None, "most patches in a chunk (default: as in the model's evaluation)", least=1)
    feat_type: str = option("features", "name of the features inside the file")
    faithfulness: bool = option(
        False, "measure whether the attention matters: remove and add patches in its order, and in random ones"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    figure_format: tuple[FigureFormat, ...] = _figure_format()
    allow_mismatch: bool = option(False, "predict although the features were made in another way than the model's")
    # What the checkpoint says already, but for some of the first version's; a flag that contradicts it is an error.
    mil: str | None = option(None, "architecture the checkpoint must hold", hidden=True)
    dataset: str | None = option(
        None,
        "cohort the checkpoint must have been trained on; names the classes where the checkpoint, one of the first "
        "version, does not",
        hidden=True,
    )
    input_dim: int | None = option(None, "feature width the checkpoint must take", least=1, hidden=True)
    num_heads: int | None = option(
        None, "attention heads, where the checkpoint does not say: those of the first version (default 4)", least=1
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
        for name in ("labels_csv", "extensions"):
            if self.input is not None and getattr(self, name):
                raise ConfigError(f"--{name} goes with --input_dir; leave it out with --input")
        if self.allow and self.labels_csv is None and self.out_of_fold is None:
            raise ConfigError(
                f"--allow {' '.join(self.allow)}: is about rows of --labels_csv; give it, or leave --allow out"
            )

    def _check_out_of_fold(self) -> None:
        """Raise ConfigError for what contradicts a run that knows its models, slides and labels."""
        for name in ("checkpoint", "input", "labels_csv", "extensions"):
            if getattr(self, name):
                raise ConfigError(
                    f"--out_of_fold {self.out_of_fold}: knows its models, slides and labels; leave --{name} out"
                )
        of_a_table = [word for word in self.allow if word != "missing"]
        if of_a_table:
            raise ConfigError(
                f"--allow {' '.join(of_a_table)}: goes with --labels_csv; leave it out with --out_of_fold"
            )


@dataclass(frozen=True, kw_only=True)
class PredictionRecipe(_Checked):
    """Extraction on the fly. Where the training features' recipe is recorded, these must agree with it."""

    backbone: str | None = option(None, "backbone, where the checkpoint records none")
    weights: Path | None = option(None, "the backbone's local weights instead of a download")
    patch_size: int | None = option(None, "patch edge in pixels, at the resolution asked for", least=1)
    stride: int | None = option(None, "distance between patch corners, in pixels at the resolution read", least=1)
    level: int | None = option(None, "pyramid level read", least=0)
    mpp: float | None = option(None, "um per pixel of the patches", least=0.05, most=40)
    tissue_threshold: float | None = option(None, "least fraction of tissue in a patch", least=0, most=1)
    slides_csv: Path | None = option(
        None, "table wsi,mpp: the um per level-0 pixel of slides whose own is missing or wrong"
    )
    slide_mpp: float | None = option(
        None, "um per level-0 pixel of all slides, but for those in --slides_csv", least=0.05, most=40
    )
    batch_size: int = option(Extraction.batch_size, "patches per forward pass", least=1)
    save_features: bool = option(False, "keep the features as <output_dir>/<slide>.h5")


@dataclass(frozen=True, kw_only=True)
class Pictures(_Checked):
    """What `--visualize` draws."""

    visualize: bool = option(False, "draw the attention: heatmap, report page, patches, QuPath tiles and .npz")
    wsi: Path | None = option(
        None,
        "the slide the feature file was made from, with --input_dir their folder (needed with --visualize)",
        metavar="FILE|DIR",
    )
    top_k: int = option(10, "how many of the most attended patches are shown", least=1)
    scale: Literal["attention", "percentile"] = option("percentile", "what colour shows: attention, or its percentile")
    cmap: str = option("viridis", "Matplotlib colour map")
    alpha: float = option(0.5, "opacity of the heatmap over the slide", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wsi is not None and not self.visualize:
            raise ConfigError(f"--wsi {self.wsi}: the slide to draw on; give --visualize with it")
        for name in ("top_k", "scale", "cmap", "alpha"):
            if not self.visualize and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f"--{name} {getattr(self, name)}: how pictures look; give --visualize with it")


@dataclass(frozen=True, kw_only=True)
class Download(_Checked):
    """What `datasets.download` fetches."""

    name: Literal["breast", "kidney", "lung", "tupac", "test-slide"] = option(
        REQUIRED, "a cohort (MAD-MIL study, Zenodo 10563985), or a slide to try", positional=True
    )
    labels_only: bool = option(False, "the label table without the features")
    output_dir: Path | None = option(None, "where it goes (default: datasets/<name>, testSlides for the slide)")


@dataclass(frozen=True, kw_only=True)
class Demo(_Checked):
    """What `datasets.demo` draws."""

    test_slide: bool = option(False, "testSlides/testSlide.svs and its features instead of the demo cohort")


@dataclass(frozen=True, kw_only=True)
class Conversion(_Checked):
    """Which feature files `utils.convert` rewrites as ours, and how."""

    input: Path = option(REQUIRED, "a feature file, or a folder of them", metavar="IN", positional=True)
    output: Path = option(REQUIRED, "where it goes: a file for a file, or a folder", metavar="OUT", positional=True)
    format: Literal["h5", "pt"] | None = option(None, "feature file format (default: h5, or as OUT ends)")
    dtype: Literal["float16", "float32"] | None = option(None, "precision of the features (default: as stored)")
    feat_type: str = option("features", "name of the features inside each file")
    mpp: float | None = option(
        None, "um per level-0 pixel of all the slides; some layouts' patches are placed by it", least=0.05, most=40
    )
    slides_dir: Path | None = option(None, "folder of the slides, found by the files' names, to read their mpp from")
    overwrite: bool = option(False, "replace files of OUT that hold something else")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mpp is not None and self.slides_dir is not None:
            raise ConfigError("give one of --mpp (the same for all slides) and --slides_dir (read off each slide)")


@dataclass(frozen=True, kw_only=True)
class Audit(CohortFiles):
    """What `python -m utils.audit` looks at."""

    dataset: str | None = option(None, "name of the cohort, as for train.py (not needed with --labels_csv)")
    splits: Path | None = option(
        None,
        "splits to check: our splits.json, a splits_<k>.csv of CLAM or MAD-MIL, or a folder of those",
        metavar="FILE|DIR",
    )
    json: bool = option(False, "print one JSON object instead of text")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is None and self.labels_csv is None:
            raise ConfigError("give --dataset (a cohort's name) or --labels_csv (its table)")


@dataclass(frozen=True, kw_only=True)
class Comparison(_Checked):
    """Which training runs `python -m utils.compare` compares, and in what."""

    runs: tuple[Path, ...] = option(REQUIRED, "folders of finished training runs", metavar="RUN", positional=True)
    metrics: tuple[str, ...] = option(
        ("auc", "balanced_accuracy", "f1_macro"),
        "figures to compare, the primary one first (default: auc balanced_accuracy f1_macro)",
        metavar="NAME",
    )
    output_dir: Path | None = option(
        None, "where the tables and the figures go (default: outputs/comparison/<run>_vs_<run>)"
    )
    figure_format: tuple[FigureFormat, ...] = _figure_format()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.runs) < 2:
            raise ConfigError(f"RUN: {len(self.runs)} given; give the folders of two finished runs or more")
