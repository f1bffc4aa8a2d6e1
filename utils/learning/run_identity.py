"""The identity of a training run: a run with the same one is resumed, any other is a new run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from utils.bags.dataset import MILDataset
from utils.bags.inventory import FileRecord
from utils.core.files import digest
from utils.learning.jobs import Trainer
from utils.learning.protocol import splits_content
from utils.learning.settings import Protocol
from utils.learning.splits import OuterFold


def settings_identity(trainer: Trainer, protocol: Protocol, folds: Sequence[OuterFold]) -> dict[str, Any]:
    """Return the identity's fields of settings, model and classes."""
    data = trainer.dataset
    training = {name: value for name, value in asdict(trainer.training).items() if name != "standardize"}
    splits = json.dumps(splits_content(data, folds, protocol.seed)) if protocol.splits else None
    return {
        "model": trainer.spec,
        "training": training,
        **{name: value for name, value in asdict(protocol).items() if name != "grid"},
        "splits": splits and digest(splits),
        "grid": [str(setting) for setting in trainer.settings],
        "feed": trainer.feed.as_dict(),
        "device": trainer.device.type,
        "feat_type": data.feat_type,
        **data.task.record,
        "groups": digest(*data.groups),
    }


def slides_identity(data: MILDataset, records: Sequence[FileRecord], standardized: Sequence[int]) -> dict[str, Any]:
    """Return the identity's fields of the slides: rows, features, and in which folds features are standardised."""
    return {
        "slides": digest(*(f"{row.wsi_id}\t{row.case_id}\t{row.label}" for row in data.slide_rows)),
        "features": digest(*(record.sha256 for record in records)),
        "standardized": list(standardized),
    }


def slides_by_time(data: MILDataset) -> str:
    """Return the digest by which earlier versions identified the slides: of ids, labels, file sizes and times."""
    files = [(row, row.path.stat()) for row in data.slide_rows]
    lines = [(row.wsi_id, row.case_id, row.label, stat.st_size, stat.st_mtime_ns) for row, stat in files]
    return digest("\n".join("\t".join(map(str, line)) for line in lines))
