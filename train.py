"""Train a multiple-instance-learning model under nested, patient-level cross-validation.

uv run train.py --mil LiteMIL --dataset demo
uv run train.py --mil LiteMIL --dataset mine --features_dir features/ --labels_csv labels.csv
uv run train.py --mil TransMIL --dataset breast --mode full --batch_size 16
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from utils.bags.settings import Cohort, CohortFiles
from utils.core import cli
from utils.core.errors import ConfigError
from utils.core.model_help import model_help
from utils.core.ray_settings import Cluster
from utils.learning.settings import PRESETS, Analyses, DryRun, Model, Preset, Protocol, Running, Training

if TYPE_CHECKING:
    from collections.abc import Callable

    from MILS.bag_model import BagModel
    from utils.mil_dataset import MILDataset

# Imports that take seconds are made where they are used, so that --help and a mistyped flag are answered at once.

FLAGS = {
    "cohort": Cohort, "model": Model, "training": Training, "training as published": Preset,
    "cross-validation": Protocol, "covariates and subgroups": Analyses, "running": Running,
    "beyond one machine": Cluster, "before a long run": DryRun,
}  # fmt: skip


def main() -> None:
    epilog = model_help(Path(__file__).parent / "MILS")
    cohort, model, training, preset, protocol, analyses, running, cluster, run = cli.parse(
        str(__doc__), FLAGS, epilog=epilog, presets=PRESETS
    )
    from datasets.demo import make_demo
    from utils.core.engine import check_engine
    from utils.evaluation.closing_table import closing_text, level_words
    from utils.mil_dataset import MILDataset
    from utils.nested_cv import NestedCrossValidation
    from utils.prediction.trained_model import model_name

    name = model_name(model.mil)
    check_engine(cluster, running.jobs, running.device)
    is_demo = cohort.dataset == "demo" and cohort.labels_csv is None
    if is_demo:
        make_demo()
    if run.dry_run:
        print(audit_text(cohort, protocol))
    dataset = MILDataset.of_cohort(cohort)
    of_task = "" if cohort.task == "classification" else f"_{cohort.task}"
    output_dir = running.output_dir or Path("outputs") / name / f"{cohort.dataset}{of_task}"
    settings = {**asdict(training), **asdict(protocol), **asdict(cluster), **asdict(analyses)}
    settings |= {"dataset_name": cohort.dataset, "preset": preset.preset}
    settings |= {field: getattr(running, field) for field in ("device", "jobs", "deterministic", "figure_format")}
    factory = model_factory(name, model, dataset)
    cv = NestedCrossValidation(factory, dataset, dataset.class_names, output_dir, **settings)
    if run.dry_run:
        print(f"\n{cv.dry_run()}\n\nNothing was trained: a dry run (took {cli.took()}).")
        print("Next: the same command without --dry_run")
        return
    results = cv.run()
    print(f"\n{name} on {cohort.dataset}: out-of-fold, {level_words(results)}\n\n{closing_text(results)}\n")
    chosen = output_dir / "all_folds_best.pth"
    if protocol.final == "all":
        print(f"A model of all slides, for use elsewhere, is {output_dir / 'all_slides.pth'}; expect the figures above")
    print(f"Results are in {output_dir} (took {cli.took()}); the model chosen on inner validation is {chosen}")
    print(next_words(output_dir, chosen, is_demo, f" --mil {model.mil}" if ":" in model.mil else ""))


def next_words(output_dir: Path, chosen: Path, is_demo: bool, mil: str) -> str:
    """Return the commands to try after a training; `mil` names other people's code there."""
    from datasets.demo import next_command

    if is_demo:
        title = "The slides are synthetic. Next, one that no model has seen, with its heatmap:"
        return f"\n{title}\n\n  {next_command(chosen)}{mil}"
    return (
        "\nNext, each slide by the model that did not see it, and a new slide, with heatmaps:\n\n"
        f"  uv run predict.py --out_of_fold {output_dir} --visualize --wsi SLIDES_DIR{mil}\n"
        f"  uv run predict.py --checkpoint {chosen} --input SLIDE --visualize{mil}"
    )


def audit_text(cohort: Cohort, protocol: Protocol) -> str:
    """Return the findings of an audit of the cohort."""
    from utils.audit import Audit, as_text, audit_cohort

    files = {field.name: getattr(cohort, field.name) for field in fields(CohortFiles)}
    return as_text(audit_cohort(Audit(**files, dataset=cohort.dataset, splits=protocol.splits)))


def model_factory(name: str, model: Model, dataset: MILDataset) -> Callable[[], BagModel]:
    """Return a function that makes a fresh model for each training. Raises ConfigError for settings it cannot have."""
    from MILS import ModelError, mil_factory
    from utils.learning.grid import model_arguments

    if model.input_dim not in (None, dataset.input_dim):
        raise ConfigError(
            f"--input_dim {model.input_dim}: the features are {dataset.input_dim} wide; leave the flag out"
        )
    flags, arguments = model.hyperparameters(), model_arguments(model.mil_args, name)
    if twice := flags.keys() & arguments.keys():
        raise ConfigError(f"--mil_args {min(twice)}: is given as --{min(twice)}, too; drop one")
    make = mil_factory(name, input_dim=dataset.input_dim, num_classes=dataset.task.num_logits, **flags | arguments)
    try:
        make()
    except ModelError as error:
        raise ConfigError(f"--mil {model.mil}: {error}") from error
    return make


if __name__ == "__main__":
    cli.run(main)
