"""Read checkpoints of the first version.

It wrote LiteMIL's state dict, with the same parameter names as today, by itself (`fold_<k>_best.pth`) or together with
the class names (`all_folds_best.pth`). The tensors' shapes give every size except the number of heads.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from MILS.bag_model import ModelError
from utils.core.cohorts import KNOWN_COHORTS
from utils.core.errors import CheckpointError
from utils.core.runtime import log
from utils.prediction.forward_pass import SlideFeed

# The first train.py ignored --num_heads.
_NUM_HEADS = 4
_CHOSEN_BY = "the first version of LiteMIL"


def weights_in(content: Any) -> Any:
    """Return what is the state dict if the file is of the first version."""
    return content.get("model_state_dict", content) if isinstance(content, dict) else content


def is_first_version(content: Any) -> bool:
    weights = weights_in(content)
    return isinstance(weights, dict) and any(str(name).startswith("stream.") for name in weights)


def checkpoint_fields(
    path: Path,
    content: dict[str, Any],
    class_names: Sequence[str] | None,
    dataset: str | None,
    num_heads: int | None,
) -> dict[str, Any]:
    """Return the fields of a `Checkpoint` from a file of the first version and the user's settings.

    The class names are the file's, else those of the known cohort `dataset`, else `class_names`; `num_heads` None is 4.
    Raises CheckpointError if class names are missing or contradict each other, or if they or the heads contradict the
    tensors; ModelError, TypeError or AttributeError if the file is damaged.
    """
    weights = weights_in(content)
    model = _spec(weights) | {"num_heads": _NUM_HEADS if num_heads is None else num_heads}
    heads, width = model["num_heads"], model["hidden_dim"]
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"{path}: {heads} attention heads do not divide its width of {width}; "
            "give the number it was trained with, --num_heads"
        )
    recorded = content.get("model_config", {}).get("class_names")
    return {
        "model": model,
        "state_dict": weights,
        "class_names": _class_names(path, recorded, dataset, class_names, model["num_classes"]),
        "dataset": dataset,
        "feed": SlideFeed(None, "merge").as_dict(),
        "recipe": None,
        "mpp_range": None,
        "selection": _selection(content),
        "seen": {"case": [], "slide": []},
        "versions": {},
    }


def log_assumptions(path: Path, checkpoint: dict[str, Any], has_num_heads: bool) -> None:
    """Warn of the sizes that were read from the tensors or assumed, and that the reported accuracy is optimistic."""
    model, selection = checkpoint["model"], checkpoint["selection"]
    log.warning(
        "%s: a checkpoint of the first version; by its tensors a %s of %d features, hidden_dim %d, num_queries %d and "
        "%d classes, with num_heads %d %s",
        path,
        model["name"],
        model["input_dim"],
        model["hidden_dim"],
        model["num_queries"],
        model["num_classes"],
        model["num_heads"],
        "as given" if has_num_heads else "assumed, for the file does not say (--num_heads)",
    )
    if "slide_accuracy" in selection:
        log.warning(
            "%s: was chosen by its accuracy on an outer test fold, so the accuracy reported with it (%s) is optimistic",
            path,
            selection["slide_accuracy"],
        )


def _spec(weights: dict[str, Any]) -> dict[str, Any]:
    """Return LiteMIL's arguments except the heads, and dropout, which prediction does not use."""
    # Read the width from a vector, so that a transposed matrix is the one that the error names.
    (hidden_dim,) = _shape(weights, "stream.project.1.weight", 1)
    (num_classes,) = _shape(weights, "classifier.3.bias", 1)
    num_queries, _ = _shape(weights, "stream.query", 2)
    _, input_dim = _shape(weights, "stream.project.0.weight", 2)
    return {
        "name": "LiteMIL",
        "input_dim": input_dim,
        "num_classes": num_classes,
        "hidden_dim": hidden_dim,
        "num_queries": num_queries,
    }


def _shape(weights: dict[str, Any], name: str, axes: int) -> tuple[int, ...]:
    tensor = weights.get(name)
    shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
    if isinstance(shape, str) or len(shape) != axes:
        raise ModelError(f"{name} is {shape}, not a tensor of {axes} axes")
    return shape


def _class_names(
    path: Path, recorded: Any, dataset: str | None, class_names: Sequence[str] | None, num_classes: int
) -> tuple[str, ...]:
    """Return the class names. Raises CheckpointError if there are none, or if the file and the user disagree."""
    if recorded is not None and not (isinstance(recorded, list | tuple) and all(isinstance(n, str) for n in recorded)):
        raise TypeError(f"class_names are {recorded!r}")
    cohort = KNOWN_COHORTS.get(dataset or "")
    sources = {"the file": recorded, f"--dataset {dataset}": cohort and cohort.class_names, "class_names": class_names}
    names_by = {source: tuple(names) for source, names in sources.items() if names is not None}
    cohorts = [name for name, cohort in KNOWN_COHORTS.items() if len(cohort.class_names) == num_classes]
    remedy = "give " + " or ".join([*(f"--dataset {name}" for name in cohorts), "SlidePredictor's class_names"])
    if not names_by:
        raise CheckpointError(f"{path}: does not say what its {num_classes} classes are called; {remedy}")
    source, names = next(iter(names_by.items()))
    for second_source, second_names in names_by.items():
        if second_names != names:
            raise CheckpointError(
                f"{path}: its classes are {', '.join(names)} by {source}, {', '.join(second_names)} by "
                f"{second_source}; leave out the one that is wrong"
            )
    if len(names) != num_classes:
        raise CheckpointError(
            f"{path}: has {num_classes} classes, {source} names {len(names)} ({', '.join(names)}); {remedy}"
        )
    return names


def _selection(content: dict[str, Any]) -> dict[str, Any]:
    if "slide_accuracy" not in content:
        return {
            "chosen_by": _CHOSEN_BY,
            "chosen_on": "not recorded; inner validation if this is one of its fold_<k>_best.pth",
        }
    accuracy = content["slide_accuracy"]
    is_accuracy = isinstance(accuracy, float | np.floating) and 0 <= accuracy <= 1
    return {
        "chosen_by": _CHOSEN_BY,
        "chosen_on": "outer test folds",
        "monitor": "slide_accuracy",
        "slide_accuracy": float(accuracy) if is_accuracy else None,
    }
