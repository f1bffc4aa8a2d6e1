"""A cohort without a fault, and one to put faults into."""

import shutil

import pytest

from tests.auditing.audit_helpers import Cohort


@pytest.fixture(scope="session")
def clean(tmp_path_factory) -> Cohort:
    """Not to be changed."""
    return Cohort(tmp_path_factory.mktemp("clean"))


@pytest.fixture
def cohort(clean, tmp_path) -> Cohort:
    copy = object.__new__(Cohort)
    copy.labels_csv, copy.features_dir = tmp_path / "labels.csv", tmp_path / "features"
    shutil.copy(clean.labels_csv, copy.labels_csv)
    shutil.copytree(clean.features_dir, copy.features_dir)
    return copy
