"""Whose a file is that is no checkpoint of LiteMIL's: told by the names in it; nothing in it is executed."""

import io
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_BYTES = 50_000_000  # of a pickle that is looked through; the tensors lie elsewhere
_MOST_PICKLES = 5  # one after the other, as PyTorch once wrote its files
_TRAIN = "LiteMIL predicts with models of its own: train one on the same features (train.py), or predict with {}"
_STATE_DICT = (
    "of a LiteMIL save its state_dict (torch.save(model.state_dict(), FILE)), of any other give the fold_<k>_best.pth "
    "or all_folds_best.pth that train.py wrote"
)
_ENCODER = "a backbone encodes patches: give its weights to extractFeatures.py --weights, and train a model on that"


@dataclass(frozen=True)
class _Kind:
    """`names`: beginnings of names, each of which stands in every file of the kind."""

    what: str
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
    """Return whose file the names speak for and what to do instead, as the end of a message; "" where nobody is known.

    A first part, such as Lightning's "model.", may stand before the names.
    """
    known = set(names)
    known |= {name.partition(".")[2] for name in known}
    for kind in _KINDS:
        if all(any(name.startswith(beginning) for name in known) for beginning in kind.names):
            return f"; it looks like {kind.what}; {kind.advice}"
    return ""


def names_in(content: Any) -> list[str]:
    """Return the names of what a file holds, and of what its parts do."""
    if not isinstance(content, dict):
        return []
    return [str(name) for part in (content, *content.values()) if isinstance(part, dict) for name in part]


def names_of_pickle(path: Path) -> list[str]:
    """Return the words in a file that cannot be loaded as plain tensors: its pickle is read, and not executed.

    Of a damaged file they are those up to the damage.
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
