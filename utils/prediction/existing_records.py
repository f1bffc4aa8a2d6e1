"""Check existing prediction records against the command's request, and remove the pictures of replaced ones."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.bags.direct_read import Fingerprint
from utils.core.differences import differences, first_differences
from utils.core.errors import ConfigError, first_few
from utils.core.files import read_record
from utils.core.plots import FORMATS, figure_paths
from utils.pictures.attention_map import models_of
from utils.slides.find import is_slide_file
from utils.tasks.records import Answer

ENDING = "_prediction.json"
FAITHFULNESS = "{}_faithfulness"  # a figure, one file per format
# Fields of a request that a record holds outside its own request.
_RECORDED_ELSEWHERE = ("num_heads", "class_names", "feed", "recipe")
_FEED = ("mode", "chunk_size", "aggregation", "sequential")
_NEEDED = {"slide", "model", "checkpoint", "recipe", *_FEED}


def request_of(source: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request for a prediction: the input file as it is now, and the settings."""
    file = Fingerprint.at(source)
    sizes = {"input_bytes": file and file.size, "input_mtime_ns": file and file.mtime_ns}
    return {"input": source.name, **settings, **sizes}


def request_entry(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `request` entry of a record: what the record does not hold elsewhere."""
    return {name: value for name, value in request.items() if name not in _RECORDED_ELSEWHERE}


def request_in(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the whole request that a record was made for, or None if it is not such a record."""
    request = record.get("request")
    if not isinstance(request, dict) or not record.keys() >= _NEEDED:
        return None
    try:
        answer = Answer.of(record)
    except (KeyError, TypeError, ValueError):
        return None
    if "input" not in request:  # earlier versions wrote the whole request
        return comparable_settings(request)
    return {
        **request,
        "num_heads": sorted({model.get("num_heads") or 0 for model in models_of(record)}),
        "class_names": list(answer.values),
        "feed": {name: record[name] for name in (*_FEED, "unit") if name in record},
        "recipe": _comparable(record["recipe"]) if is_slide_file(request["input"]) else None,
    }


def comparable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as `request_in` has them."""
    recipe = settings.get("recipe")
    return {**settings, "recipe": recipe and _comparable(recipe)}


def _comparable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without the precision, which depends on the device: a folder may be continued on another one."""
    return {name: value for name, value in recipe.items() if name != "precision"}


def read_finished(target: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record an earlier run wrote for this same request, or None if there is none.

    Raises ConfigError if `target` holds another prediction, or anything else.
    """
    if not target.exists():
        return None
    record = read_record(target)
    if request_in(record) is None:
        raise ConfigError(f"{target}: exists, and is no prediction that can be read; move it, or give --overwrite")
    _check_request(target, record, request, whole=True)
    return record


def check_settings(targets: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if the first readable record among the targets was made with other settings."""
    for target in targets:
        record = read_record(target)
        if request_in(record) is not None:
            _check_request(target, record, settings, whole=False)
            return


def has_settings(record: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether a record was made with these settings."""
    recorded = request_in(record)
    return recorded is not None and not differences(comparable_settings(settings), recorded, settings, strict=True)


def _check_request(target: Path, record: Mapping[str, Any], request: Mapping[str, Any], *, whole: bool) -> None:
    """Raise ConfigError unless the record was made for the request or, if not `whole`, with the same settings."""
    recorded, expected = request_in(record) or {}, comparable_settings(request)
    fields = dict.fromkeys([*expected, *recorded] if whole else expected)
    if "input" not in recorded:
        fields.pop("input", None)
    unlike = differences(expected, recorded, fields, strict=True)
    if unlike:
        paths = record["checkpoint"] if isinstance(record["checkpoint"], list) else [record["checkpoint"]]
        raise ConfigError(
            f"{target}: is another prediction, by {first_few(paths, 1)} ({first_differences(unlike)}); give another "
            "--output_dir, or --overwrite"
        )


def clear_pictures(target: Path, record: Mapping[str, Any]) -> None:
    """Remove pictures of the old record at `target` that the new record will not replace, and folders left empty."""
    earlier, folder = read_record(target), target.parent.resolve()
    stale: list[str] = []
    if earlier.get("faithfulness") != record.get("faithfulness"):
        stale = [path.name for path in figure_paths(folder / FAITHFULNESS.format(record["slide"]), FORMATS)]
    if "pictures" in earlier and "pictures" not in record:
        stale += earlier["pictures"]["files"]
    for name in stale:
        path = folder / name
        if path.resolve().is_relative_to(folder):  # a record may name no file elsewhere
            path.unlink(missing_ok=True)
            if path.parent.resolve() != folder:
                with suppress(OSError):  # it holds something else
                    path.parent.rmdir()
