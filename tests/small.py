"""A small cohort and small models, for tests of training and prediction."""

from collections.abc import Callable

import numpy as np
import pytest

from MILS import build_mil
from MILS.bag_model import BagModel
from tests.cohort import write_cohort
from utils.mil_dataset import MILDataset
from utils.tasks.calibration import Scaling
from utils.tasks.classification import Classification
from utils.tasks.metrics import METRICS

TASK = Classification(("no", "yes"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> MILDataset:
    """24 slides of 12 patients, of 5 to 60 patches: one to three chunks each."""
    csv, features = write_cohort(tmp_path_factory.mktemp("cohort"), patches=(5, 60))
    return MILDataset(csv, features, chunk_size=20)


@pytest.fixture
def make_model() -> Callable[..., BagModel]:
    """A small model without dropout."""

    def make(name: str = "LiteMIL", **options) -> BagModel:
        small = {"hidden_dim": 16, "dropout": 0.0} | ({"num_heads": 2} if name in ("LiteMIL", "TransMIL") else {})
        return build_mil(name, **({"input_dim": 16, "num_classes": 2} | small | options))

    return make


def classification_metrics(labels, probabilities, class_names=()):
    """Return the metrics of a classification; without class names those of `METRICS` alone."""
    names = tuple(class_names) or tuple(map(str, range(probabilities.shape[1])))
    figures = Classification(names).unweighted_metrics(labels, probabilities)
    return figures if class_names else {name: figures[name] for name in METRICS}


def scale_probabilities(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities `(..., C)` calibrated by a temperature alone, as by earlier models."""
    return Scaling(temperature).apply(probabilities)
