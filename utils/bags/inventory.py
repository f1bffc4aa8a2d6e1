"""Record what the feature files of a cohort hold, so that a later run recognizes files whose time alone has changed.

A file with the same size and time is the same; otherwise its features are read and compared.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.bags.content_digest import features_digest
from utils.bags.direct_read import Fingerprint
from utils.bags.feature_folder import refuse
from utils.bags.labels import LabelRow
from utils.bags.store import BagInfo
from utils.core.errors import FeatureFileError
from utils.core.runtime import progress

_ROWS = 4096  # read at a time, so that a slide's features need not fit in memory twice


@dataclass(frozen=True)
class FileRecord:
    """A slide's feature file: its size and time, the digest of its features (type, shape and values) and their root
    mean square.
    """

    wsi_id: str
    bytes: int
    mtime_ns: int
    sha256: str
    rms: float

    @classmethod
    def of(cls, wsi_id: str, fingerprint: Fingerprint, features: Tensor) -> "FileRecord":
        """Return the record of a slide with `features (N, D)`."""
        rms = root_mean_square(features)
        return cls(wsi_id, fingerprint.size, fingerprint.mtime_ns, features_digest(features), rms)

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.bytes, self.mtime_ns)


def root_mean_square(features: Tensor) -> float:
    """Return the root mean square of all values of `features (N, D)`."""
    squares = sum(float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2 for rows in features.split(_ROWS))
    return (squares / features.numel()) ** 0.5


def take_inventory(
    rows: Sequence[LabelRow],
    info: Sequence[BagInfo],
    features: Callable[[int], Tensor],
    earlier: Mapping[str, FileRecord],
) -> list[FileRecord]:
    """Return each slide's record: the earlier one of its `wsi_id` if size and time are the same, else a new one from
    the slide's `features (N, D)`. Raises FeatureFileError, naming all files that cannot be read.
    """
    records = {row.wsi_id: earlier[row.wsi_id] for row in rows if row.wsi_id in earlier}
    changed = [
        slide
        for slide, row in enumerate(rows)
        if row.wsi_id not in records or records[row.wsi_id].fingerprint != info[slide].fingerprint
    ]
    faults = []
    for slide in progress(changed, "Reading features", unit="slide", leave=False) if changed else ():
        wsi_id, fingerprint = rows[slide].wsi_id, info[slide].fingerprint
        assert fingerprint is not None  # noqa: S101 - for the type checker: `peek_bag` sets it
        try:
            records[wsi_id] = FileRecord.of(wsi_id, fingerprint, features(slide))
        except FeatureFileError as error:
            faults.append(str(error))
    refuse(FeatureFileError, faults, len(rows))
    return [records[row.wsi_id] for row in rows]


def read_inventory(path: Path) -> dict[str, FileRecord]:
    """Return the records that `write_records` wrote to `path`, by slide; none if they cannot be read, so that the
    features are read instead.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        return {
            line["wsi_id"]: FileRecord(
                line["wsi_id"], int(line["bytes"]), int(line["mtime_ns"]), line["sha256"], float(line["rms"])
            )
            for line in lines
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
