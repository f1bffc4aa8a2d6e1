"""Recognize checkpoints of other tools by the names in them; nothing in a file is executed."""

import io
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_BYTES = 50_000_000  # of a pickle, which holds no tensors
_MOST_PICKLES = 5  # old PyTorch files hold several in a row
_TRAIN = "LiteMIL predicts with models of its own: train one on the same features (train.py), or predict with {}"
_STATE_DICT = (
    "of a LiteMIL save its state_dict (torch.save(model.state_dict(), FILE)), of any other give the fold_<k>_best.pth "
    "or all_folds_best.pth that train.py wrote"
)
_ENCODER = "a backbone encodes patches: give its weights to extractFeatures.py --weights, and train a model on that"


@dataclass(frozen=True)
class _Kind:
    """A kind of file: every file of it has a name with each of the prefixes `names`."""

    description: str
    names: tuple[str, ...]
    advice: str


_KINDS = (
    _Kind("a CLAM model", ("attention_net.", "classifiers.", "instance_classifiers."), _TRAIN.format("CLAM")),
    _Kind("an attention model of CLAM's", ("attention_net.", "classifier"), _TRAIN.format("its own toolkit")),
    _Kind("a TransMIL model of its authors", ("_fc1.", "_fc2.", "pos_layer.", "layer1.attn."), _TRAIN.format("theirs")),
    _Kind("a DSMIL model", ("i_classifier.", "b_classifier."), _TRAIN.format("DSMIL's own code")),
    _Kind("a model of torchmil's", ("pool.fc1.", "pool.fc2.", "classifier."), _TRAIN.format("torchmil")),
    _Kind("an ABMIL of another toolkit's", ("attention_V.", "attention_U."), _TRAIN.format("its own toolkit")),
    _Kind("an ABMIL of another toolkit's", ("attention.0.", "attention.2."), _TRAIN.format("its own toolkit")),
    _Kind("a model of STAMP's", ("stamp_version",), _TRAIN.format("STAMP")),
    _Kind("a model of STAMP's", ("class_token", "project_features.", "mlp_head."), _TRAIN.format("STAMP")),
    _Kind("the weights of a vision transformer", ("blocks.0.attn.",), _ENCODER),
    _Kind("the weights of a vision transformer", ("encoder.layer.0.attention.",), _ENCODER),
    _Kind("the weights of a ResNet", ("conv1.", "layer1.0.", "bn1."), _ENCODER),
    _Kind("a Lightning checkpoint", ("pytorch-lightning_version",), _TRAIN.format("the code that trained it")),
    _Kind("a whole model, pickled", ("_parameters", "_buffers", "_modules"), _STATE_DICT),
)


def origin(names: Iterable[str]) -> str:
    """Return the kind of a file with these names and the advice, as the end of a message; "" for an unknown kind.

    The names may have a first component such as Lightning's "model.".
    """
    variants = set(names)
    variants |= {name.partition(".")[2] for name in variants}
    for kind in _KINDS:
        if all(any(name.startswith(prefix) for name in variants) for prefix in kind.names):
            return f"; it looks like {kind.description}; {kind.advice}"
    return ""


def names_in(content: Any) -> list[str]:
    """Return the keys of a file's content and of the dicts in it."""
    if not isinstance(content, dict):
        return []
    return [str(name) for level in (content, *content.values()) if isinstance(level, dict) for name in level]


def names_of_pickle(path: Path) -> list[str]:
    """Return the strings in the pickle of a file that cannot be loaded as plain tensors, without executing it.

    Of a damaged file, return those before the damage.
    """
    words = []
    try:
        content = io.BytesIO(_pickle_of(path))
        for _ in range(_MOST_PICKLES):
            words += [word for _, word, _ in pickletools.genops(content) if isinstance(word, str)]
    except (ValueError, LookupError, EOFError, OSError, struct.error, zipfile.BadZipFile, NotImplementedError):
        pass
    return words


def _pickle_of(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(name) as file:
            return file.read(_MOST_BYTES)
