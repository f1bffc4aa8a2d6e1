"""Audit the feature files of a cohort: missing or damaged files, copies, scale of features, bag sizes, recipes."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.auditing.findings import AuditedBag, AuditedSlide, Finding, Level, by_class, field_names, slides_text
from utils.bags import labels
from utils.bags.feature_folder import FeatureFolder
from utils.bags.inventory import root_mean_square
from utils.bags.store import peek_bag, read_bag
from utils.core.errors import FeatureFileError, LabelsError, first_few, plural
from utils.core.files import digest
from utils.core.passport import Passport
from utils.core.recipe import COMPARED_FIELDS, MPP_TOLERANCE
from utils.core.runtime import progress
from utils.learning.standardization import why_unusual

SMALL_BAG = 10
MOST_READ = 4e9  # bytes of features; of larger cohorts, only every k-th slide is read
_MOST_LINES = 20  # damaged files with a line of their own; the others are counted


def check_files(
    slides: Sequence[AuditedSlide], folder: FeatureFolder, feat_type: str, wsi_ids: Collection[str], level: Level
) -> tuple[list[Finding], list[AuditedBag]]:
    """Return the findings, and the slides whose feature files open."""
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
    """Find slides with equal features; only bags of equal shape are read."""
    sizes = Counter((bag.info.num_instances, bag.info.dim) for bag in bags)
    candidates = [bag for bag in bags if sizes[bag.info.num_instances, bag.info.dim] > 1]
    findings: list[Finding] = []
    by_digest: dict[str, list[AuditedBag]] = defaultdict(list)
    for bag in progress(candidates, "Comparing bags of one size", unit="slide", leave=False):
        try:
            by_digest[_content_digest(bag.path, feat_type)].append(bag)
        except FeatureFileError as error:
            findings.append(Finding("error", "files", str(error), {"slide": bag.wsi_id}))
    copies = [group for group in by_digest.values() if len(group) > 1]
    for group in copies:
        leaks = len({bag.case_id for bag in group}) > 1 or len({bag.label for bag in group}) > 1
        fault = "the same features under several patients or labels" if leaks else "the same features more than once"
        names = first_few([f"{bag.wsi_id} ({bag.case_id}, {classes[bag.label]})" for bag in group])
        details = {"slides": [bag.wsi_id for bag in group]}
        findings.append(Finding("error" if leaks else "warning", "content", f"{fault}: {names}; keep one", details))
    if bags and not copies:
        findings.append(Finding("ok", "content", "no two slides have the same features", {"read": len(candidates)}))
    return findings


def _content_digest(path: Path, feat_type: str) -> str:
    features = read_bag(path, feat_type).features
    with np.errstate(over="ignore"):  # one precision for all, so that a copy in another precision has the same digest
        half = features.astype(np.float16)
    return digest(str(features.shape), (half if np.isfinite(half).all() else features).tobytes())


def check_scale(bags: Sequence[AuditedBag], feat_type: str) -> list[Finding]:
    """Check that features can be read, and have the scale that models are initialised for."""
    findings, scales = [], []
    every = max(1, math.ceil(sum(bag.info.nbytes for bag in bags) / MOST_READ))
    for bag in progress(bags[::every], "Reading features", unit="slide", leave=False):
        try:
            scales.append(root_mean_square(torch.from_numpy(read_bag(bag.path, feat_type).features)))
        except FeatureFileError as error:
            findings.append(Finding("error", "files", str(error), {"slide": bag.wsi_id}))
    if not scales:
        return findings
    median = float(np.median(scales))
    slides = plural(len(scales), "slide") + (f"; of {len(bags)}, others were not read" if every > 1 else "")
    details = {"rms": median, "read": len(scales)}
    reason = why_unusual(np.array(scales), bags[0].info.dim)
    if reason is None:
        message = f"the features' root mean square is {median:.3g} (median of {slides}), as models expect"
        return [*findings, Finding("ok", "scale", message, details)]
    message = f"{reason} ({slides}); train standardises them unless told --standardize off"
    return [*findings, Finding("warning", "scale", message, details)]


def check_bags(bags: Sequence[AuditedBag], classes: Sequence[str]) -> list[Finding]:
    findings = []
    for name, class_bags in by_class(bags, classes).items():
        if class_bags:
            sizes = quartiles(bag.info.num_instances for bag in class_bags)
            span = f"{sizes['least']:.0f} to {sizes['greatest']:.0f} patches a slide, median {sizes['median']:.0f}"
            middle = f"the middle half {sizes['lower_quartile']:.0f} to {sizes['upper_quartile']:.0f}"
            findings.append(Finding("info", "bags", f"{name}: {span}, {middle}", {"class": name} | sizes))
    small = {bag.wsi_id: bag.info.num_instances for bag in bags if bag.info.num_instances < SMALL_BAG}
    if small:
        ids = first_few([f"{wsi_id} ({size})" for wsi_id, size in small.items()])
        message = f"{plural(len(small), 'slide')} of fewer than {SMALL_BAG} patches: {ids}; look at their tissue masks"
        findings.append(Finding("warning", "bags", message, {"slides": small}))
    return findings


def check_recipes(bags: Sequence[AuditedBag]) -> list[Finding]:
    findings = []
    widths = _differing({bag.wsi_id: bag.info.dim for bag in bags})
    if widths:
        message = f"features of different widths: {slides_text(widths)}; extract all slides with one backbone"
        findings.append(Finding("error", "recipe", message, {"slides": widths}))
    recorded = {bag.wsi_id: bag.info.passport for bag in bags if bag.info.passport}
    for name in field_names(passport.recipe.as_dict() for passport in recorded.values()):
        values = _differing({wsi_id: passport.recipe[name] for wsi_id, passport in recorded.items()})
        if values:
            changes_features = name in COMPARED_FIELDS
            remedy = "extract all slides with one recipe" if changes_features else "make sure that this is meant"
            message = f"{name} differs: {slides_text(values)}; {remedy}"
            findings.append(Finding("error" if changes_features else "warning", "recipe", message, {"slides": values}))
    mpps = [passport.slide["mpp_delivered"] for passport in recorded.values() if _has_mpp(passport)]
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
    """Warn of slides of unknown um/px: their patches may show another magnification."""
    unknown = [wsi_id for wsi_id, passport in recorded.items() if not _has_mpp(passport)]
    if not unknown:
        return []
    message = (
        f"{plural(len(unknown), 'slide')} of {len(recorded)} whose um/px is not known: {first_few(unknown)}; their "
        "patches may show another magnification than the others', so extract them with --slides_csv, or with "
        "--slide_mpp if it is the same for all"
    )
    return [Finding("warning", "recipe", message, {"slides": unknown})]


def _has_mpp(passport: Passport) -> bool:
    return passport.slide.get("mpp_delivered") is not None


def _differing(value_of: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the slides of each value, the most common value first; empty if all known values agree."""
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
