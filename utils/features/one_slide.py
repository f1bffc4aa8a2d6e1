"""Extract one slide into its feature file, unless the file already holds the same features."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.bags.store import BagInfo, peek_bag
from utils.core.differences import differences, first_differences
from utils.core.errors import FeatureFileError, RecipeError
from utils.features.extracted_patches import dropped_text
from utils.features.extractor import WSIFeatureExtractor
from utils.slides.batch import SlideNotes
from utils.slides.slide import Slide
from utils.slides.slide_status import ANEW, KEPT_OUTLINES, OUTLINES, SlideStatus


def extract_one(
    extractor: WSIFeatureExtractor,
    slide: Path | Slide,
    target: Path,
    overwrite: bool = False,
    notes: SlideNotes | None = None,
) -> SlideStatus:
    """Make sure that `target` holds the features of `slide`: extract them unless the file holds them already, made with
    the same recipe from the same tissue. A slide that is open stays open.

    Raises SlideError, NoTissueError, and RecipeError if `target` holds something else and `overwrite` is not given.
    """
    notes, is_outdated = notes or SlideNotes(), False
    if target.exists() and not overwrite:
        current = current_status(extractor, slide, target, notes)
        if current is not None:
            return current
        is_outdated = True
    started = time.perf_counter()
    extracted = extractor.extract_to(slide, target, notes)
    seconds = round(time.perf_counter() - started, 2)
    reasons = [ANEW] if is_outdated else []
    reasons += [dropped_text(extracted.dropped)] if extracted.dropped else []
    tissue = OUTLINES if extracted.plan.outlines_digest else ""
    path, count = slide.path if isinstance(slide, Slide) else slide, len(extracted.coords)
    return SlideStatus(path, "done", "; ".join(reasons), count, extracted.plan.mpp, seconds, tissue=tissue)


def current_status(
    extractor: WSIFeatureExtractor, slide: Path | Slide, target: Path, notes: SlideNotes
) -> SlideStatus | None:
    """Return the status of a slide whose feature file exists; None if it was made from other tissue than in the notes.

    Raises RecipeError if `target` holds something else.
    """
    info, is_same_tissue = _check_current(extractor, slide, target, notes)
    if not is_same_tissue:
        return None
    record = info.passport.slide if info.passport else {}
    reasons = [f"{target} is there, of the same recipe"]
    if record.get("tissue") and notes.tissue is None:
        reasons.append(KEPT_OUTLINES)
    reasons += [dropped_text(record["dropped"])] if record.get("dropped") else []
    path = slide.path if isinstance(slide, Slide) else slide
    return SlideStatus(
        path, "skipped", "; ".join(reasons), info.num_instances, record.get("mpp_delivered"),
        tissue=OUTLINES if record.get("tissue") else "",
    )  # fmt: skip


def _check_current(
    extractor: WSIFeatureExtractor, slide: Path | Slide, target: Path, notes: SlideNotes
) -> tuple[BagInfo, bool]:
    """Return what `target` holds, and whether it was made from the tissue in the notes, if they describe any.

    Raises RecipeError unless it holds this slide's features, made with this recipe. Our own files are always complete,
    so anything else belongs to the user and is not overwritten.
    """
    try:
        info = peek_bag(target)
    except FeatureFileError as error:
        raise RecipeError(f"{error}; the output exists: move it, or extract with --overwrite") from error
    if info.passport is None:
        raise RecipeError(
            f"{target}: was made by something else (it holds no recipe); move it, or extract with --overwrite"
        )
    recorded = {name: info.passport.slide.get(name) for name in ("quick_hash", "mpp", "data_hash")}
    with extractor.opened(slide, notes.mpp) as opened:
        actual = {"quick_hash": opened.quick_hash(), "mpp": opened.mpp}
        actual["data_hash"] = recorded["data_hash"] and opened.data_hash()  # older files do not record it
        unlike = _differences(extractor, info.passport.recipe.as_dict(), recorded, actual)
        if unlike:
            is_other_data = any(recorded[name] != actual[name] for name in ("quick_hash", "data_hash"))
            why = "the slide's data has changed since it was made" if is_other_data else "made with another recipe"
            raise RecipeError(f"{target}: {why} ({first_differences(unlike)}); move it, or extract with --overwrite")
        return info, notes.is_same_tissue(opened, info.passport.slide.get("tissue"))


def _differences(
    extractor: WSIFeatureExtractor, recipe: Mapping[str, Any], recorded: Mapping[str, Any], actual: Mapping[str, Any]
) -> list[str]:
    """Return how a file's `recipe` differs from the extractor's, and what it `recorded` of the slide from what the
    slide is now.
    """
    before, now = ({f"slide's {name}": value for name, value in facts.items()} for facts in (recorded, actual))
    in_file, expected = {**recipe, **before}, {**extractor.recipe.as_dict(), **now}
    if extractor.config.precision == "auto":
        # Each device has its own precision: a batch that goes on on another device is the same batch.
        expected["precision"] = in_file.get("precision")
    for settings in (in_file, expected):
        settings["edge"] = settings.get("edge") or "drop"  # as the flag has it
    return differences(expected, in_file, expected, strict=True)
