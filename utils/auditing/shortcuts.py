"""Audit shortcuts: fields other than the tissue that predict the label."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from utils.auditing.findings import IDENTITY, AuditedBag, AuditedSlide, Finding, field_names
from utils.core.cohorts import tcga_site
from utils.core.errors import first_few, plural
from utils.core.passport import Passport
from utils.core.placeholders import is_placeholder
from utils.core.recipe import Recipe
from utils.core.runtime import progress
from utils.evaluation.confounding import Confounding, Value, confounding, values_per_class
from utils.learning.settings import Protocol

# Columns of a label table that say where or how a slide was made.
ORIGIN_COLUMNS = ("site", "scanner", "center", "centre", "hospital", "institution", "batch")
# A field is a warning if its p-value is at most this, and its AUC exceeds the shuffled median by at least this.
_MOST_P, _LEAST_EXCESS = 0.01, 0.1
NEAR_PERFECT_AUC = 0.9


@dataclass(frozen=True)
class Nuisance:
    """A field that may predict the label, with a value for each slide. `column` is its name for `--group_column`, also
    if it is not in the table yet; None if slides cannot be grouped by it.
    """

    name: str
    values: list[Value]
    column: str | None = None
    in_table: bool = False


def check_confounding(
    slides: Sequence[AuditedSlide], bags: Sequence[AuditedBag], classes: Sequence[str], word: str
) -> list[Finding]:
    """Return how well each known origin of the slides predicts their classes, or what `word` calls them."""
    labels = np.array([slide.label for slide in slides], dtype=int)
    cases = np.array([slide.case_id for slide in slides])
    findings = []
    for nuisance in progress(
        _nuisances(slides, bags), "Predicting the label without tissue", unit="field", leave=False
    ):
        result = confounding(nuisance.values, labels, cases)
        if result is None:
            message = f"{nuisance.name}: one value or one {word} only, nothing to test"
            findings.append(Finding("info", "confounding", message))
        else:
            findings.append(_report(nuisance, result, slides, classes, word))
    if not findings:
        message = "no site, scanner or other origin is known, nor a bag's size: nothing to test"
        findings.append(Finding("info", "confounding", message))
    return findings


def _report(
    nuisance: Nuisance, result: Confounding, slides: Sequence[AuditedSlide], classes: Sequence[str], word: str
) -> Finding:
    low, middle, high = result.shuffled
    numbers = (
        f"AUC {result.auc:.2f} by patient-grouped cross-validation; "
        f"with shuffled labels {low:.2f} to {high:.2f}; p {result.p_value:.3f}"
    )
    labels = np.array([slide.label for slide in slides])
    counts = dict(zip(classes, values_per_class(nuisance.values, labels, len(classes)), strict=True))
    details: dict[str, Any] = {"field": nuisance.name} | asdict(result) | {"values_per_class": counts}
    if result.p_value > _MOST_P:
        below = "" if result.auc >= 0.5 else "; below 0.5 is usual by chance: values that one fold has, the others lack"
        return Finding(
            "ok", "confounding", f"no sign that {nuisance.name} predicts the label ({numbers}{below})", details
        )
    if result.auc - middle < _LEAST_EXCESS:
        return Finding("info", "confounding", f"{nuisance.name} alone predicts the label a little ({numbers})", details)
    verb = "gives the label away" if result.auc >= NEAR_PERFECT_AUC else "predicts the label"
    message = f"{nuisance.name} alone {verb} ({numbers}); {_remedy(nuisance, counts, slides, word)}"
    return Finding("warning", "confounding", message, details)


def _remedy(nuisance: Nuisance, counts: Mapping[str, int], slides: Sequence[AuditedSlide], word: str) -> str:
    """Return the remedy: folds that keep each value on one side, or why they are impossible."""
    if nuisance.column is None:
        return "a model that does not clearly beat this AUC may have learned no more"
    fewest = min(counts, key=lambda name: counts[name])
    if counts[fewest] < Protocol.n_outer:
        reason = f"{fewest} comes with {plural(counts[fewest], 'value')} of it for {Protocol.n_outer} outer folds"
        return f"{reason}, so that no split can separate the two: add slides of that {word} from elsewhere"
    values_of: dict[str, set[Value]] = defaultdict(set)
    for slide, value in zip(slides, nuisance.values, strict=True):
        values_of[slide.case_id].add(value)
    several = sorted(case_id for case_id, values in values_of.items() if len(values - {None}) > 1)
    if several:
        return f"folds cannot keep patients and its values whole: several values in {first_few(several)}"
    train = f"train with --group_column {nuisance.column}"
    if not nuisance.in_table:
        return f"add it to the table as a column {nuisance.column} and {train}"
    unknown = nuisance.values.count(None)
    return f"{train}, after filling it in for {plural(unknown, 'slide')}" if unknown else train


def _nuisances(slides: Sequence[AuditedSlide], bags: Sequence[AuditedBag]) -> list[Nuisance]:
    """Return the fields of the table, of the files and of their passports that may predict the label."""
    columns = [name for name in (slides[0].row if slides else {}) if name.lower() in ORIGIN_COLUMNS]
    nuisances = [
        Nuisance(f"the column {name}", [_value_of(slide.row[name]) for slide in slides], name, True) for name in columns
    ]
    sites = [tcga_site(slide.case_id) or tcga_site(slide.wsi_id) for slide in slides]
    has_sites = 2 * sum(site is not None for site in sites) >= len(slides) > 0
    if has_sites and "site" not in [name.lower() for name in columns]:
        nuisances.append(Nuisance("the TCGA site code", [*sites], "site", True))
    info_of = {bag.wsi_id: bag.info for bag in bags}
    infos = [info_of.get(slide.wsi_id) for slide in slides]
    if bags:
        sizes: list[Value] = [info.num_instances if info else None for info in infos]
        nuisances.append(Nuisance("bag size (patches per slide)", sizes))
    passports = [(info and info.passport) or Passport(Recipe()) for info in infos]
    for owner, records in (
        ("recipe", [passport.recipe.as_dict() for passport in passports]),
        ("slide", [passport.slide for passport in passports]),
    ):
        for name in field_names(records):
            values = [record.get(name) for record in records]
            is_scalar = all(isinstance(value, str | int | float | None) for value in values)
            if name not in IDENTITY and is_scalar and len(set(values) - {None}) > 1:
                is_text = any(isinstance(value, str) for value in values)
                nuisances.append(Nuisance(f"the {owner}'s {name}", values, name if is_text else None))
    return nuisances


def _value_of(text: str) -> str | None:
    return None if is_placeholder(text) else text
