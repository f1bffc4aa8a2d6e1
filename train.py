"""Train a multiple-instance-learning model under nested, patient-level cross-validation.

uv run train.py --mil LiteMIL --dataset demo
uv run train.py --mil LiteMIL --dataset mine --features_dir features/ --labels_csv labels.csv
uv run train.py --mil TransMIL --dataset breast --mode full --batch_size 16
"""

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from datasets.demo import make_demo, next_command
from MILS import ModelError, build_mil, list_mils, mil_name, mil_options
from MILS.pooling import BagModel
from utils.audit import as_text, audit_cohort
from utils.core import cli
from utils.core.config import Audit, Cluster, Cohort, CohortFiles, Model, Protocol, Rehearsal, Running, Training
from utils.core.engine import check_engine
from utils.core.errors import ConfigError
from utils.learning.results import closing_words
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation


def main() -> None:
    groups = {
        "cohort": Cohort,
        "model": Model,
        "training": Training,
        "cross-validation": Protocol,
        "running": Running,
        "beyond one machine": Cluster,
        "before a long run": Rehearsal,
    }
    cohort, model, training, protocol, running, cluster, rehearsal = cli.parse(
        str(__doc__), groups, epilog=model_help()
    )
    name = checked_name(model)
    check_engine(cluster, running.jobs, running.device)
    is_demo = cohort.dataset == "demo" and cohort.labels_csv is None
    if is_demo:
        make_demo()
    if rehearsal.dry_run:
        print(audited(cohort, protocol))
    dataset = MILDataset.of_cohort(cohort)
    output_dir = running.output_dir or Path("outputs") / name / cohort.dataset
    where = {name: getattr(running, name) for name in ("device", "jobs", "figure_format")}
    settings = asdict(training) | asdict(protocol) | asdict(cluster) | where
    factory = model_factory(name, model, dataset)
    cv = NestedCrossValidation(
        factory, dataset, dataset.class_names, output_dir, dataset_name=cohort.dataset, **settings
    )
    if rehearsal.dry_run:
        print(f"\n{cv.dry_run()}\n\nNothing was trained: a dry run.")
        return
    results = cv.run()
    print(f"\n{name} on {cohort.dataset}: out-of-fold, slide level\n\n{closing_words(results)}\n")
    chosen = output_dir / "all_folds_best.pth"
    print(f"Results are in {output_dir} (took {cli.took()}); the model chosen on inner validation is {chosen}")
    if is_demo:
        print("\nThe slides are synthetic. Next, one that no model has seen, with its heatmap:\n")
        print(f"  {next_command(chosen)}")
    else:
        print("\nNext, a slide with its heatmap:\n")
        print(f"  uv run predict.py --checkpoint {chosen} --input SLIDE --visualize")


def audited(cohort: Cohort, protocol: Protocol) -> str:
    """What an audit finds about the cohort."""
    shared = {field.name: getattr(cohort, field.name) for field in fields(CohortFiles)}
    return as_text(audit_cohort(Audit(**shared, dataset=cohort.dataset, splits=protocol.splits)))


def checked_name(model: Model) -> str:
    try:
        return mil_name(model.mil)
    except ModelError as error:
        raise ConfigError(f"--mil {model.mil}: {error}") from error


def model_factory(name: str, model: Model, dataset: MILDataset) -> Callable[[], BagModel]:
    """What makes a fresh model for each training; the settings are tried once here, so that they fail early."""
    if model.input_dim not in (None, dataset.input_dim):
        raise ConfigError(
            f"--input_dim {model.input_dim}: the features are {dataset.input_dim} wide; leave the flag out"
        )

    make = partial(
        build_mil, name, input_dim=dataset.input_dim, num_classes=len(dataset.class_names), **model.hyperparameters()
    )
    try:
        make()
    except ModelError as error:
        raise ConfigError(f"--mil {name}: {error}") from error
    return make


def model_help() -> str:
    """Which flags each model takes, and its own defaults, for --help."""
    lines = ["each model's hyperparameters and their defaults:"]
    for name in list_mils():
        flags = {option: default for option, default in mil_options(name).items() if option in vars(Model)}
        lines.append(f"  {name:16} " + "  ".join(f"--{option} {default}" for option, default in flags.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
