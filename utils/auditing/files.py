"""What an audit asks about the feature files: whether they are there, sound, different, and made in one way."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.auditing.findings import AuditedBag, AuditedSlide, Finding, Level, by_class, fields, slides_text
from utils.bags import labels
from utils.bags.feature_folder import FeatureFolder
from utils.bags.inventory import root_mean_square
from utils.bags.store import peek_bag, read_bag
from utils.core.errors import FeatureFileError, LabelsError, first_few, plural
from utils.core.files import digest
from utils.core.passport import Passport
from utils.core.recipe import COMPARED_FIELDS, MPP_TOLERANCE
from utils.core.runtime import progress
from utils.learning.scale import why_unusual

SMALL_BAG = 10
# The features of all slides are read, or of as many as take so many bytes.
_MOST_READ = 4e9
# Damaged files beyond so many are counted in one line.
_MOST_LINES = 20


def check_files(
    slides: Sequence[AuditedSlide], folder: FeatureFolder, feat_type: str, wsi_ids: Collection[str], level: Level
) -> tuple[list[Finding], list[AuditedBag]]:
    """The findings, and the slides whose files open, with what those say of themselves."""
    bags, missing, damaged = [], [], {}
    for slide in progress(slides, "Looking at feature files", unit="slide", leave=False):
        try:
            folder.check_unique([slide.wsi_id])
            path = folder.find(slide.wsi_id)
            if path is None:
                missing.append(slide.wsi_id)
            else:
                bags.append(AuditedBag(slide.row, slide.label, path, peek_bag(path, feat_type)))
        except (FeatureFileError, LabelsError) as error:
            damaged[slide.wsi_id] = str(error)
    findings = [
        Finding("error", "files", reason, {"slide": wsi_id}) for wsi_id, reason in list(damaged.items())[:_MOST_LINES]
    ]
    if len(damaged) > _MOST_LINES:
        message = f"{len(damaged) - _MOST_LINES} more files with such faults (--json names them)"
        findings.append(Finding("error", "files", message, {"slides": damaged}))
    if missing:
        near = labels.near_ids(missing, lambda: folder.files)
        names = first_few([labels.missed_id(wsi_id, near) for wsi_id in missing])
        message = f"{plural(len(missing), 'slide')} without a feature file in {folder.path}: {names}"
        message += f"; {labels.id_hint(near) or 'extract them'}"
        message += ", or train with --allow missing" if len(missing) < len(slides) else ""
        findings.append(Finding(level, "files", message, {"slides": missing}))
    if slides and not findings:
        findings = [Finding("ok", "files", f"{plural(len(slides), 'slide')}, each with a feature file that opens")]
    rowless = [file.name for wsi_id, files in folder.files.items() if wsi_id not in wsi_ids for file in files]
    if rowless:
        message = f"{plural(len(rowless), 'feature file')} without a row in the table: {first_few(rowless)}"
        findings.append(Finding("info", "files", message, {"files": rowless}))
    return findings, bags


def check_content(bags: Sequence[AuditedBag], feat_type: str, classes: Sequence[str]) -> list[Finding]:
    """Slides whose features are the same numbers; only files alike in size are read."""
    alike = Counter((bag.info.num_instances, bag.info.dim) for bag in bags)
    suspects = [bag for bag in bags if alike[bag.info.num_instances, bag.info.dim] > 1]
    findings: list[Finding] = []
    same: dict[str, list[AuditedBag]] = defaultdict(list)
    for bag in progress(suspects, "Comparing bags of one size", unit="slide", leave=False):
        try:
            same[_content_digest(bag.path, feat_type)].append(bag)
        except FeatureFileError as error:
            findings.append(Finding("error", "files", str(error), {"slide": bag.wsi_id}))
    copies = [group for group in same.values() if len(group) > 1]
    for group in copies:
        across = len({bag.case_id for bag in group}) > 1 or len({bag.label for bag in group}) > 1
        what = "the same features under several patients or labels" if across else "the same features more than once"
        told = first_few([f"{bag.wsi_id} ({bag.case_id}, {classes[bag.label]})" for bag in group])
        details = {"slides": [bag.wsi_id for bag in group]}
        findings.append(Finding("error" if across else "warning", "content", f"{what}: {told}; keep one", details))
    if bags and not copies:
        findings.append(Finding("ok", "content", "no two slides have the same features", {"read": len(suspects)}))
    return findings


def _content_digest(path: Path, feat_type: str) -> str:
    features = read_bag(path, feat_type).features
    with np.errstate(over="ignore"):  # one precision for all, so that a copy stored in another is found
        half = features.astype(np.float16)
    told = half if np.isfinite(half).all() else features
    return digest(str(features.shape), told.tobytes())


def check_scale(bags: Sequence[AuditedBag], feat_type: str) -> list[Finding]:
    """Whether features can be read, and are of the scale that models are initialised for."""
    findings, squares = [], []
    every = max(1, math.ceil(sum(bag.info.nbytes for bag in bags) / _MOST_READ))
    for bag in progress(bags[::every], "Reading features", unit="slide", leave=False):
        try:
            squares.append(root_mean_square(torch.from_numpy(read_bag(bag.path, feat_type).features)))
        except FeatureFileError as error:
            findings.append(Finding("error", "files", str(error), {"slide": bag.wsi_id}))
    if not squares:
        return findings
    median = float(np.median(squares))
    of = plural(len(squares), "slide") + (f"; of {len(bags)}, others were not read" if every > 1 else "")
    details = {"rms": median, "read": len(squares)}
    why = why_unusual(np.array(squares), bags[0].info.dim)
    if why is None:
        message = f"the features' root mean square is {median:.3g} (median of {of}), as models expect"
        return [*findings, Finding("ok", "scale", message, details)]
    message = f"{why} ({of}); train standardises them unless told --standardize off"
    return [*findings, Finding("warning", "scale", message, details)]


def check_bags(bags: Sequence[AuditedBag], classes: Sequence[str]) -> list[Finding]:
    findings = []
    for name, mine in by_class(bags, classes).items():
        if mine:
            spread = quartiles(bag.info.num_instances for bag in mine)
            told = f"{spread['least']:.0f} to {spread['greatest']:.0f} patches a slide, median {spread['median']:.0f}"
            middle = f"the middle half {spread['lower_quartile']:.0f} to {spread['upper_quartile']:.0f}"
            findings.append(Finding("info", "bags", f"{name}: {told}, {middle}", {"class": name} | spread))
    small = {bag.wsi_id: bag.info.num_instances for bag in bags if bag.info.num_instances < SMALL_BAG}
    if small:
        told = first_few([f"{wsi_id} ({size})" for wsi_id, size in small.items()])
        message = f"{plural(len(small), 'slide')} of fewer than {SMALL_BAG} patches: {told}; look at their tissue masks"
        findings.append(Finding("warning", "bags", message, {"slides": small}))
    return findings


def check_recipes(bags: Sequence[AuditedBag]) -> list[Finding]:
    findings = []
    widths = _differing({bag.wsi_id: bag.info.dim for bag in bags})
    if widths:
        message = f"features of different widths: {slides_text(widths)}; extract all slides with one backbone"
        findings.append(Finding("error", "recipe", message, {"slides": widths}))
    recorded = {bag.wsi_id: bag.info.passport for bag in bags if bag.info.passport}
    for name in fields(passport.recipe.as_dict() for passport in recorded.values()):
        values = _differing({wsi_id: passport.recipe[name] for wsi_id, passport in recorded.items()})
        if values:
            encodes = name in COMPARED_FIELDS
            remedy = "extract all slides with one recipe" if encodes else "make sure that this is meant"
            message = f"{name} differs: {slides_text(values)}; {remedy}"
            findings.append(Finding("error" if encodes else "warning", "recipe", message, {"slides": values}))
    known = [passport.slide.get("mpp_delivered") for passport in recorded.values()]
    mpps = [mpp for mpp in known if mpp is not None]
    if mpps and max(mpps) > min(mpps) * (1 + MPP_TOLERANCE):
        message = f"patches were read at {min(mpps):.4g} to {max(mpps):.4g} um/px, more than {MPP_TOLERANCE:.0%} apart"
        findings.append(Finding("warning", "recipe", f"{message}; extract all slides at one resolution"))
    findings += _check_unknown_mpp(recorded)
    if recorded and not findings:
        findings.append(Finding("ok", "recipe", f"{plural(len(recorded), 'slide')} recorded as made in one way"))
    if len(recorded) < len(bags):
        message = f"{len(bags) - len(recorded)} of {plural(len(bags), 'slide')} without a record of how they were made"
        findings.append(Finding("info", "recipe", message))
    return findings


def _check_unknown_mpp(recorded: Mapping[str, Passport]) -> list[Finding]:
    """Slides of which nobody knows how large their patches are: at one pixel size they may show different scales."""
    unknown = [wsi_id for wsi_id, passport in recorded.items() if passport.slide.get("mpp_delivered") is None]
    if not unknown:
        return []
    message = (
        f"{plural(len(unknown), 'slide')} of {len(recorded)} whose um/px is not known: {first_few(unknown)}; their "
        "patches may show another magnification than the others', so extract them with --slides_csv, or with "
        "--slide_mpp if it is the same for all"
    )
    return [Finding("warning", "recipe", message, {"slides": unknown})]


def _differing(value_of: Mapping[str, Any]) -> dict[str, list[str]]:
    """The slides of each value, the commonest first; empty where all known values agree."""
    slides_of: dict[str, list[str]] = defaultdict(list)
    for wsi_id, value in value_of.items():
        if value is not None:
            slides_of[value if isinstance(value, str) else json.dumps(value, sort_keys=True)].append(wsi_id)
    if len(slides_of) < 2:
        return {}
    return dict(sorted(slides_of.items(), key=lambda item: -len(item[1])))


def quartiles(values: Iterable[int]) -> dict[str, float]:
    names = ("least", "lower_quartile", "median", "upper_quartile", "greatest")
    return dict(zip(names, np.percentile(list(values), [0, 25, 50, 75, 100]).tolist(), strict=True))
