"""Train a multiple-instance-learning model under nested, patient-level cross-validation.

uv run train.py --mil LiteMIL --dataset mine --features_dir features/ --labels_csv labels.csv
uv run train.py --mil TransMIL --dataset breast --mode full --batch_size 16
"""

from collections.abc import Callable
from pathlib import Path

from MILS import ModelError, build_mil, list_mils, mil_name, mil_options
from MILS.pooling import BagModel
from utils.core import cli
from utils.core.config import Cohort, Model, Protocol, Training
from utils.core.errors import ConfigError
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation, results_table


def main() -> None:
    groups = {"cohort": Cohort, "model": Model, "training": Training, "cross-validation": Protocol}
    cohort, model, training, protocol = cli.parse(str(__doc__), groups, epilog=model_help())
    name = checked_name(model)
    dataset = MILDataset.of_cohort(cohort)
    output_dir = protocol.output_dir or Path("outputs") / name / cohort.dataset
    cv = NestedCrossValidation(
        model_factory(name, model, dataset),
        dataset,
        dataset.class_names,
        output_dir,
        protocol.n_outer,
        protocol.n_inner,
        training.batch_size,
        training.epochs,
        training.patience,
        protocol.device,
        training.use_amp,
        lr=training.lr,
        weight_decay=training.weight_decay,
        seed=protocol.seed,
        dataset_name=cohort.dataset,
    )
    results = cv.run()
    print(f"\n{name} on {cohort.dataset}: out-of-fold, slide level\n\n{results_table(results)}\n")
    print(f"Results are in {output_dir}; the model chosen on inner validation is {output_dir / 'all_folds_best.pth'}")


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

    def make() -> BagModel:
        return build_mil(
            name, input_dim=dataset.input_dim, num_classes=len(dataset.class_names), **model.hyperparameters()
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
