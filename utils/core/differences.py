"""Compare two sets of settings, and say in a few words what differs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# A message names at most so many settings that differ, and shortens each value to so many characters.
_MOST_DIFFERENCES, _MOST_CHARACTERS = 4, 60


def differences(
    expected: Mapping[str, Any], actual: Mapping[str, Any], fields: Iterable[str], *, strict: bool = False
) -> list[str]:
    """Return what differs, as 'field: found X, expected Y'; for a field that holds settings itself, each setting that
    differs. A field that is unknown (None) on one side differs only if `strict`.
    """
    lines = []
    for name in fields:
        pair = expected.get(name), actual.get(name)
        if pair[0] != pair[1] and (strict or None not in pair):
            lines += _differences_of(name, *pair)
    return lines


def first_differences(lines: Sequence[str]) -> str:
    """Return the first few differences in a line, and how many more there are, for messages."""
    more = len(lines) - _MOST_DIFFERENCES
    return "; ".join(lines[:_MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _differences_of(name: str, expected: Any, actual: Any) -> list[str]:
    if not (isinstance(expected, dict) and isinstance(actual, dict)):
        return [f"{name}: found {_short(actual)}, expected {_short(expected)}"]
    keys = [key for key in {**expected, **actual} if expected.get(key) != actual.get(key)]
    return [line for key in keys for line in _differences_of(f"{name}.{key}", expected.get(key), actual.get(key))]


def _short(value: Any) -> str:
    """Return a value as a short text; of a digest or a long text, its beginning."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    is_digest = len(text) == 64 and all(character in "0123456789abcdef" for character in text)
    if is_digest:
        return text[:12]
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."
