"""The checkpoint: everything `predict.py` needs, as plain tensors and JSON-able values."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from MILS import CodeError, build_mil
from MILS.bag_model import BagModel, ModelError
from MILS.ensemble import Ensemble
from utils.core.errors import CheckpointError
from utils.core.files import digest
from utils.core.recipe import Recipe
from utils.core.runtime import versions
from utils.core.tensor_files import load_tensors, save_tensors
from utils.prediction import first_version
from utils.prediction.foreign_checkpoints import names_in, names_of_pickle, origin
from utils.prediction.forward_pass import SlideFeed
from utils.tasks.operating_point import BALANCED
from utils.tasks.records import task_of
from utils.tasks.task import FittedFigures, Task

FORMAT = "litemil-checkpoint"
VERSION = 1
# The prefix of the weights of an ensemble's members.
_MEMBER = re.compile(r"members\.\d+\.")


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with all that its prediction needs.

    Attributes
        model: the spec that rebuilds the model, or each member of an ensemble.
        feed: how a slide is fed (`SlideFeed.as_dict`).
        recipe, mpp_range: how the training features were made, if known.
        selection: which score on which split chose these weights.
        seen: digests of the slides that it was trained or selected on: of their ids ("slide"), of the ids of their
            patients ("case") and their plain spellings ("case_spelling"), of the hashes of the slides that feature
            files record ("slide_hash"), and of the features ("features"). Empty if unknown; earlier checkpoints lack
            all but "slide" and "case". Never the ids themselves, which may identify patients.
        temperature, intercepts, prior: calibrate the probabilities (`tasks.calibration.Scaling`); fitted on inner
            validation, else None. Earlier checkpoints have a temperature alone.
        target: what is predicted (`Task.record`) instead of classes, whose names are then those of the outputs; None
            for a classification.
    """

    model: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    class_names: tuple[str, ...]
    dataset: str | None
    feed: dict[str, Any]
    recipe: Recipe | None
    mpp_range: tuple[float, float] | None
    selection: dict[str, Any]
    seen: dict[str, list[str]]
    versions: dict[str, str] = field(default_factory=versions)
    temperature: float | None = None
    intercepts: tuple[float, ...] | None = None
    prior: tuple[float, ...] | None = None
    target: dict[str, Any] | None = None

    @property
    def task(self) -> Task:
        return task_of(self.target or {"class_names": self.class_names})

    @property
    def fitted(self) -> FittedFigures:
        """Return what was fitted to inner validation (see `Task.fit_on_validation`)."""
        scaling = {"temperature": self.temperature, "intercepts": self.intercepts, "prior": self.prior}
        defaults = {"operating_point": BALANCED}  # earlier checkpoints lack it
        return {name: self.selection.get(name, defaults.get(name)) for name in self.task.decision_figures} | scaling

    def at_prevalence(self, prevalence: float) -> Self:
        """Return the checkpoint calibrated for slides of which this share is positive. Raises ValueError."""
        fitted = self.task.at_prevalence(self.fitted, prevalence)
        return replace(self, intercepts=fitted["intercepts"], prior=fitted["prior"])

    @property
    def slide_feed(self) -> SlideFeed:
        feed = self.feed
        return SlideFeed(
            feed["chunk_size"], feed["aggregation"], feed.get("sequential", False), feed.get("unit", "slide")
        )

    @cached_property
    def weights_digest(self) -> str:
        """Return the SHA-256 of the model's weights: of their names, types, shapes and values."""
        contents: list[str | bytes] = []
        for name, tensor in sorted(self.state_dict.items()):
            values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            contents += [name, f"{tensor.dtype} {tuple(tensor.shape)}", values]
        return digest(*contents)

    def build(self) -> BagModel:
        """Return the trained model, in evaluation mode, on the CPU. Raises CodeError for other people's code that the
        user has not named, or that has changed.
        """
        members = {_MEMBER.match(name) and name.split(".")[1] for name in self.state_dict}
        is_ensemble = bool(members) and None not in members
        model = Ensemble([build_mil(**self.model) for _ in members]) if is_ensemble else build_mil(**self.model)
        model.load_state_dict(self.state_dict)
        return model.eval()


def id_digests(kind: str, ids: Iterable[str]) -> list[str]:
    """Return the sorted digests of ids of a `kind`, as in `Checkpoint.seen`."""
    return sorted({digest("litemil", kind, name) for name in ids})


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; equal checkpoints give equal bytes."""
    content = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    content["recipe"] = checkpoint.recipe and checkpoint.recipe.as_dict()
    save_tensors(path, {"format": FORMAT, "format_version": VERSION, **content})


def load_checkpoint(
    path: Path, *, class_names: Sequence[str] | None = None, dataset: str | None = None, num_heads: int | None = None
) -> Checkpoint:
    """Read a checkpoint of this or of the first version.

    `class_names`, `dataset` and `num_heads` complete a file of the first version (see
    `first_version.checkpoint_fields`). Raises CheckpointError, with the path, for a file that is missing, damaged or
    not a LiteMIL checkpoint.
    """
    path = Path(path)
    try:
        content = load_tensors(path, CheckpointError, "a checkpoint written by train.py")
    except CheckpointError as failure:
        hint = origin(names_of_pickle(path))
        raise (CheckpointError(f"{failure}{hint}") if hint else failure) from failure.__cause__
    is_first_version = first_version.is_first_version(content)
    if not is_first_version:
        _check_format(path, content)
    try:
        if is_first_version:
            content = first_version.checkpoint_fields(path, content, class_names, dataset, num_heads)
        checkpoint = _parse(content)
    except CodeError as failure:
        raise CheckpointError(f"{path}: {failure}") from failure
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ModelError, RuntimeError) as failure:
        reason = textwrap.shorten(str(failure), 400, placeholder=" ...")
        raise CheckpointError(f"{path}: its parts do not fit together ({reason}); train the model again") from failure
    if is_first_version:
        first_version.log_assumptions(path, content, has_num_heads=num_heads is not None)
    return checkpoint


def _parse(content: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint with a file's content. Raises one of several errors if its fields do not fit together."""
    # Earlier files lack them.
    values: dict[str, Any] = {"temperature": None, "intercepts": None, "prior": None, "target": None, **content}
    if values["recipe"] is not None:
        values["recipe"] = Recipe.from_dict(values["recipe"])
    checkpoint = Checkpoint(**{field.name: values[field.name] for field in fields(Checkpoint)})
    types = {
        "state_dict": dict,
        "mpp_range": tuple | list | None,
        "temperature": float | None,
        "intercepts": tuple | None,
    }
    for name, kind in types.items():
        if not isinstance(getattr(checkpoint, name), kind):
            raise TypeError(f"{name} is no {kind}")
    if checkpoint.temperature is not None and not checkpoint.temperature > 0:
        raise KeyError(f"temperature {checkpoint.temperature}")
    logits, expected, _ = checkpoint.build().num_classes, checkpoint.task.num_logits, checkpoint.slide_feed
    if not checkpoint.seen.keys() >= {"slide", "case"}:
        raise KeyError("seen")
    if logits != expected:
        kind = "class names" if checkpoint.target is None else f"outputs of a {checkpoint.task.kind}"
        raise ModelError(f"{expected} {kind} for a model of {logits} outputs")
    return checkpoint


def _check_format(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        weights = first_version.weights_in(content)
        is_dict = isinstance(weights, dict)
        names = ", ".join(map(str, weights)) or "nothing" if is_dict else f"a {type(weights).__name__}"
        raise CheckpointError(
            f"{path}: not a LiteMIL checkpoint; give a fold_<k>_best.pth or all_folds_best.pth "
            f"(it holds {textwrap.shorten(names, 100, placeholder=' ...')}){origin(names_in(content))}"
        )
    if content.get("format_version") != VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {content.get('format_version')}, this LiteMIL reads {VERSION}; update LiteMIL"
        )
