"""What the tests of both kinds of checkpoint share.

Import with `from tests.prediction.checkpoint_helpers import ...`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.core.errors import CheckpointError
from utils.prediction.checkpoint import load_checkpoint


def check_refused(path: Path, message: str, **said: Any) -> None:
    """Loading fails with one line that names the file and matches `message`."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, **said)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))


def check_damage(path: Path) -> None:
    """Bytes of the file turned over anywhere: the message, or a checkpoint; never another exception."""
    rng, whole, refused = np.random.default_rng(0), path.read_bytes(), 0
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(len(whole), size=rng.choice([1, 8])):
            content[place] = rng.integers(256)
        path.write_bytes(bytes(content))
        try:
            load_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 20
