"""Answers that are there already: whether they are what is asked for, and what of them goes when they are replaced."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.bags.direct_read import Fingerprint
from utils.core.differences import differences, first_differences
from utils.core.errors import ConfigError, first_few
from utils.core.files import read_record
from utils.core.plots import FORMATS, figure_paths
from utils.slides.find import is_slide_file

ENDING = "_prediction.json"
FAITHFULNESS = "{}_faithfulness"  # a figure: its endings are its formats
# Of a request, what an answer's record says elsewhere.
_SAID_ELSEWHERE = ("num_heads", "class_names", "feed", "recipe")
_FEED = ("mode", "chunk_size", "aggregation", "sequential")
_NEEDED = {"slide", "model", "checkpoint", "probabilities", "recipe", *_FEED}


def request_of(source: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes an answer the one that was asked for: the input as it is now, and the settings."""
    now = Fingerprint.at(source)
    return {"input": source.name, **settings, "input_bytes": now and now.size, "input_mtime_ns": now and now.mtime_ns}


def recorded(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record has to hold of its request, beside what it says anyway."""
    return {name: value for name, value in request.items() if name not in _SAID_ELSEWHERE}


def request_in(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the request that a record answers; None for something that is no such record."""
    request = record.get("request")
    if not isinstance(request, dict) or not record.keys() >= _NEEDED:
        return None
    if "input" not in request:  # of a LiteMIL of before, which wrote all of it there
        recipe = request.get("recipe")
        return request | {"recipe": recipe and _comparable(recipe)}
    models = record["model"] if isinstance(record["model"], list) else [record["model"]]
    return {
        **request,
        "num_heads": sorted({model.get("num_heads") or 0 for model in models}),
        "class_names": list(record["probabilities"]),
        "feed": {name: record[name] for name in _FEED},
        "recipe": _comparable(record["recipe"]) if is_slide_file(request["input"]) else None,
    }


def comparable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as `request_in` has them."""
    recipe = settings.get("recipe")
    return {**settings, "recipe": recipe and _comparable(recipe)}


def _comparable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without the precision, which is each device's own: a folder may go on elsewhere."""
    return {name: value for name, value in recipe.items() if name != "precision"}


def kept_answer(target: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record an earlier run wrote for this same request, or None where there is none.

    Raises ConfigError where `target` holds another answer, or something else.
    """
    if not target.exists():
        return None
    record = read_record(target)
    if request_in(record) is None:
        raise ConfigError(f"{target}: is in the way, and no prediction that can be read; move it, or give --overwrite")
    _check_request(target, record, request, whole=True)
    return record


def check_first(targets: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where the first answer that is there and can be read was made with other settings."""
    for target in targets:
        record = read_record(target)
        if request_in(record) is not None:
            _check_request(target, record, settings, whole=False)
            return


def is_answer_to(record: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether a record was made with these settings, of whatever slide."""
    known = request_in(record)
    return known is not None and not differences(comparable_settings(settings), known, settings, strict=True)


def _check_request(target: Path, record: Mapping[str, Any], request: Mapping[str, Any], *, whole: bool) -> None:
    """Raise ConfigError unless the record answers the request or, if not `whole`, has the same settings."""
    known, asked = request_in(record) or {}, comparable_settings(request)
    fields = dict.fromkeys([*asked, *known] if whole else asked)
    if "input" not in known:
        fields.pop("input", None)
    unlike = differences(asked, known, fields, strict=True)
    if unlike:
        paths = record["checkpoint"] if isinstance(record["checkpoint"], list) else [record["checkpoint"]]
        raise ConfigError(
            f"{target}: is another prediction, by {first_few(paths, 1)} ({first_differences(unlike)}); give another "
            "--output_dir, or --overwrite"
        )


def clear_pictures(target: Path, record: Mapping[str, Any]) -> None:
    """Remove pictures of the old record at `target` that the new record will not replace."""
    earlier, folder = read_record(target), target.parent.resolve()
    stale: list[str] = []
    if earlier.get("faithfulness") != record.get("faithfulness"):
        stale = [path.name for path in figure_paths(folder / FAITHFULNESS.format(record["slide"]), FORMATS)]
    if "pictures" in earlier and "pictures" not in record:
        stale += earlier["pictures"]["files"]
    for name in stale:
        path = folder / name
        if path.resolve().is_relative_to(folder):  # nothing that a record names elsewhere
            path.unlink(missing_ok=True)
