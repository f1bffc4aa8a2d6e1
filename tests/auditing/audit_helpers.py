"""A cohort on disk, to be audited with faults in it."""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from tests.cohort import write_cohort
from utils.audit import Finding, audit
from utils.bags.store import read_bag, write_bag


class Cohort:
    """A cohort on disk that faults can be put into: patients P000 to P013, benign and malignant in turn."""

    def __init__(self, folder: Path) -> None:
        self.labels_csv, self.features_dir = write_cohort(folder, patients_per_class=7, patches=(20, 40))

    def file(self, wsi_id: str) -> Path:
        return self.features_dir / f"{wsi_id}.h5"

    def change(self, wsi_id: str, **fields: object) -> None:
        write_bag(self.file(wsi_id), replace(read_bag(self.file(wsi_id)), **fields))

    def change_passport(self, wsi_id: str, part: str, **fields: object) -> None:
        passport = read_bag(self.file(wsi_id)).passport
        assert passport is not None
        own = getattr(passport, part)
        changed = replace(own, **fields) if part == "recipe" else own | fields
        self.change(wsi_id, passport=replace(passport, **{part: changed}))

    def add_rows(self, *rows: str) -> None:
        self.labels_csv.write_text(self.labels_csv.read_text() + "\n".join([*rows, ""]))

    def audit(self, **settings) -> list[Finding]:
        return audit(self.labels_csv, self.features_dir, **settings)

    def found(self, level: str, topic: str, **settings) -> str:
        """The one finding of this level and topic."""
        messages = [f.message for f in self.audit(**settings) if (f.level, f.topic) == (level, topic)]
        assert len(messages) == 1, messages
        return messages[0]


def lines(findings: list[Finding]) -> list[str]:
    return [f"{finding.level} {finding.topic}: {finding.message}" for finding in findings]


def write_split(path: Path, train: list[str], val: list[str], test: list[str]) -> Path:
    pd.DataFrame({"train": pd.Series(train), "val": pd.Series(val), "test": pd.Series(test)}).to_csv(path)
    return path
