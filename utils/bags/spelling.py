"""Names that people spell in several ways: ids, sites and classes that differ, but hardly.

Nothing here merges two names. It finds those that a person should look at, and says what sets them apart.
"""

import re
import unicodedata
from collections.abc import Iterable
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path

from utils.bags.store import is_feature_file
from utils.slides.wsi import is_slide_file

# What tables write where a value is not known, without case, brackets and quotes.
_PLACEHOLDERS = {
    "", "-", "--", "---", ".", "?", "??", "na", "n/a", "n.a.", "n.a", "#n/a", "<na>", "nan", "none", "null", "nil",
    "unknown", "unk", "missing", "not available", "not applicable", "not reported", "not known", "not specified",
    "not determined", "undefined", "unspecified", "tbd", "#value!", "#ref!",
}  # fmt: skip
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212"), "-")
# From this likeness on, two words are taken for one with a slip of the pen: "malignent" and "malignant" are at 0.89,
# "hypoplasia" and "hyperplasia", "invasive" and "noninvasive" are not.
_ALIKE = 0.88
_SHORTEST_WORD, _LONG_WORD = 4, 6
_PREFIXES = {
    "a", "an", "un", "in", "im", "ir", "il", "non", "de", "dis", "anti", "pre", "post", "sub", "re", "endo", "exo",
    "peri", "para", "pan",
}  # fmt: skip
_OPPOSITES = [
    ("hyper", "hypo"), ("micro", "macro"), ("intra", "inter"), ("intra", "extra"), ("endo", "exo"), ("homo", "hetero"),
    ("pre", "post"), ("super", "sub"), ("mono", "poly"), ("uni", "bi"), ("uni", "multi"),
]  # fmt: skip


def is_placeholder(text: str) -> bool:
    """Return whether the text stands for a value that is not known: "NA", "nan", "[Not Available]", "unknown"."""
    plain = unicodedata.normalize("NFKC", text).casefold().strip("[]()'\" \t")
    return " ".join(plain.split()) in _PLACEHOLDERS


def plain_spelling(name: str) -> str:
    """Return what stays of an id when case, blanks, Unicode forms and lost zeros do not count.

    "TCGA-1" and "tcga_1" become one, and so do "3", "3.0" and "003".
    """
    text = unicodedata.normalize("NFKC", name).translate(_DASHES).casefold()
    text = "".join(character for character in text if unicodedata.category(character) != "Cf" and character.strip())
    number = re.fullmatch(r"0*(\d+?)(\.0*)?", text)
    return number[1] if number else text.replace("_", "-")


def plain_class(name: str) -> str:
    """Return what stays of a class name, where "MSI-H", "msi h" and "MSIH" are one, but "ER+" and "ER-" are two."""
    return re.sub(r"(?<=[^\W\d_])-(?=\w)|(?<=\d)-(?=[^\W\d_])", "", plain_spelling(name))


def spelled_alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of different ids that are one by their `plain_spelling`, in the order in which they occur."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(plain_spelling(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def classes_alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of class names that may be one class: spelled in two ways, or one of them misspelt."""
    return [pair for pair in combinations(dict.fromkeys(names), 2) if _is_one_class(*pair)]


def _is_one_class(first: str, second: str) -> bool:
    if plain_class(first) == plain_class(second):
        return True
    first_words, second_words = (_words(name) for name in (first, second))
    if len(first_words) != len(second_words):
        return False
    differing = [pair for pair in zip(first_words, second_words, strict=True) if pair[0] != pair[1]]
    return len(differing) == 1 and all(map(_is_long_word, differing[0])) and _is_misspelt(*differing[0])


def _words(name: str) -> list[str]:
    """The words and marks of a name, without case."""
    return re.findall(r"[^\W_]+|[^\w\s]+", unicodedata.normalize("NFKC", name).casefold())


def _is_long_word(word: str) -> bool:
    """Whether a slip of the pen is likelier than a meaning: not for numbers, grades (II, III) and abbreviations."""
    return word.isalpha() and len(word) >= _SHORTEST_WORD and not set(word) <= set("ivx")


def _is_misspelt(first: str, second: str) -> bool:
    if _differ_in_prefix(first, second):
        return False
    if len(first) == len(second):
        differing = [place for place, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]]
        if len(differing) == 1:  # not at the ends: "typea" and "typeb", "anterior" and "interior"
            return len(first) >= _LONG_WORD and 0 < differing[0] < len(first) - 1
        if len(differing) == 2 and differing[1] == differing[0] + 1 and sorted(first) == sorted(second):
            return True
    return max(SequenceMatcher(None, *pair).ratio() for pair in ((first, second), (second, first))) >= _ALIKE


def _differ_in_prefix(first: str, second: str) -> bool:
    """Whether a prefix of a meaning of its own is all that sets the words apart: typical, atypical; hyper-, hypo-."""
    shorter, longer = sorted((first, second), key=len)
    if longer.endswith(shorter) and longer[: len(longer) - len(shorter)] in _PREFIXES:
        return True
    return any(
        one.startswith(start) and other.startswith(end) and one[len(start) :] == other[len(end) :]
        for one, other in ((first, second), (second, first))
        for start, end in _OPPOSITES
    )


def without_ending(wsi_id: str) -> str:
    """Return the id without the ending of a slide or a feature file, and without the ".0" of a number."""
    if _has_ending(wsi_id):
        return wsi_id[: -len(Path(wsi_id).suffix)]
    # pandas writes a column of whole numbers with gaps as floats.
    return wsi_id[:-2] if re.fullmatch(r"\d+\.0", wsi_id) else wsi_id


def _has_ending(wsi_id: str) -> bool:
    return is_feature_file(Path(wsi_id)) or is_slide_file(wsi_id)


class NearIds:
    """The ids that there are, to look up one that just misses them."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids: dict[str, str] = {}
        for name in ids:
            self._ids.setdefault(plain_spelling(name), name)

    def of(self, wsi_id: str) -> str | None:
        """Return the id that is meant by `wsi_id`, as far as spelling can tell; None where there is none."""
        return self._ids.get(plain_spelling(wsi_id)) or self._ids.get(plain_spelling(without_ending(wsi_id)))


def why_missed(wsi_id: str, near: str) -> str:
    """Return what to do about an id of a table that misses the id `near` by its spelling."""
    bare = without_ending(wsi_id)
    if _has_ending(wsi_id):
        return f"write the ids without their ending {Path(wsi_id).suffix}"
    if unicodedata.normalize("NFC", wsi_id) == unicodedata.normalize("NFC", near):
        return "the two hold the same letters in two Unicode forms, composed and decomposed: copy the file's name"
    if re.fullmatch(r"\d+(\.0*)?", bare) and bare != near:
        return "a spreadsheet has made the ids numbers and lost their zeros: format that column as text"
    return "write the ids alike"
