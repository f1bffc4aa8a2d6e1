"""Find ids, sites and classes that differ only in spelling.

Nothing here merges two names: it finds those that a person should look at, and says how they differ.
"""

import re
import unicodedata
from collections.abc import Iterable
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path

from utils.bags.store import is_feature_file
from utils.slides.find import is_slide_file

_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212"), "-")
_QUOTES = "'\"`\u00b4\u2018\u2019\u201c\u201d"
# Cyrillic letters that look like Latin ones.
_LOOK_ALIKES = str.maketrans("\u0430\u0432\u0435\u043a\u043c\u043d\u043e\u0440\u0441\u0442\u0443\u0445", "abekmhopctyx")
# Endings of slides and features that only other tools read.
_OTHER_ENDINGS = {".ome", ".qptiff", ".zarr", ".isyntax", ".vsi", ".jp2", ".npy", ".npz", ".pkl"}
# Words of the same meaning.
_SAME_WORDS = [{"0", "false"}, {"1", "true"}, {"yes", "y"}, {"no", "n"}]
# Two words at least this similar are taken for one and its misspelling: "malignent" and "malignant" are at 0.89;
# "hypoplasia" and "hyperplasia", "invasive" and "noninvasive" are not.
_ALIKE = 0.88
_SHORTEST_WORD, _LONG_WORD = 4, 6
_SHORTEST_ABBREVIATION = 3
_PREFIXES = {
    "a", "an", "un", "in", "im", "ir", "il", "non", "de", "dis", "anti", "pre", "post", "sub", "re", "endo", "exo",
    "peri", "para", "pan",
}  # fmt: skip
_OPPOSITES = [
    ("hyper", "hypo"), ("micro", "macro"), ("intra", "inter"), ("intra", "extra"), ("endo", "exo"), ("homo", "hetero"),
    ("pre", "post"), ("super", "sub"), ("mono", "poly"), ("uni", "bi"), ("uni", "multi"),
]  # fmt: skip


def plain_spelling(name: str) -> str:
    """Reduce an id to what is left without case, blanks, quotes, accents, Unicode forms and leading zeros.

    "TCGA-1", "tcga_1" and "TCGA.01" become the same, and so do "P1" and "P-01", or "3", "3.0" and "003".
    """
    text = unicodedata.normalize("NFKD", name).translate(_DASHES).casefold().translate(_LOOK_ALIKES).strip(_QUOTES)
    text = "".join(letter for letter in text if unicodedata.category(letter) not in ("Cf", "Mn") and letter.strip())
    number = re.fullmatch(r"0*(\d+?)(\.0*)?(e[+-]?0+)?", text)
    if number or re.fullmatch(r"\d+\.\d+", text):
        return number[1] if number else text
    text = re.sub(r"(?<=[^\W\d_])-(?=\d)", "", re.sub(r"[_.]", "-", text))
    return re.sub(r"(?<!\d)0+(?=\d)", "", text)


def plain_class(name: str) -> str:
    """Reduce a class name, so that "MSI-H", "msi h" and "MSIH" become the same, but "ER+" and "ER-" stay different."""
    return re.sub(r"(?<=[^\W\d_])-(?=\w)|(?<=\d)-(?=[^\W\d_])", "", plain_spelling(name.rstrip(".:;, ")))


def spelled_alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of different ids with the same `plain_spelling`, in order of occurrence."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(plain_spelling(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def classes_alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of class names that may mean the same class: spelled in two ways, or one misspelt."""
    return [pair for pair in combinations(dict.fromkeys(names), 2) if _is_one_class(*pair)]


def _is_one_class(first: str, second: str) -> bool:
    plain = {plain_class(first), plain_class(second)}
    if len(plain) == 1 or plain in _SAME_WORDS:
        return True
    first_words, second_words = (_words(name) for name in (first, second))
    if len(first_words) == len(second_words) == 1 and _is_abbreviated(
        *sorted((first_words[0], second_words[0]), key=len)
    ):
        return True
    if len(first_words) != len(second_words):
        return False
    differing = [pair for pair in zip(first_words, second_words, strict=True) if pair[0] != pair[1]]
    return len(differing) == 1 and all(map(_is_long_word, differing[0])) and _is_misspelt(*differing[0])


def _words(name: str) -> list[str]:
    """Return the words and marks of a name, in lower case."""
    return re.findall(r"[^\W_]+|[^\w\s]+", unicodedata.normalize("NFKC", name).casefold())


def _is_long_word(word: str) -> bool:
    """Return whether a changed letter is likely a misspelling: not in numbers, grades (II, III) and abbreviations."""
    return word.isalpha() and len(word) >= _SHORTEST_WORD and not set(word) <= set("ivx")


def _is_abbreviated(short: str, long: str) -> bool:
    """Return whether a word abbreviates the other, as "pos" does "positive", but not "type" "typea", or "II" "III"."""
    left_out = len(long) - len(short)
    return long.startswith(short) and min(len(short), left_out) >= _SHORTEST_ABBREVIATION and long.isalpha()


def _is_misspelt(first: str, second: str) -> bool:
    if _differ_in_prefix(first, second):
        return False
    if len(first) == len(second):
        differing = [index for index, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]]
        if len(differing) == 1:  # not at the ends: "typea" and "typeb", "anterior" and "interior"
            return len(first) >= _LONG_WORD and 0 < differing[0] < len(first) - 1
        if sorted(first) == sorted(second):  # "bening", "begnin"
            return True
    return max(SequenceMatcher(None, *pair).ratio() for pair in ((first, second), (second, first))) >= _ALIKE


def _differ_in_prefix(first: str, second: str) -> bool:
    """Return whether the words differ only in a prefix that changes the meaning: typical, atypical; hyper-, hypo-."""
    shorter, longer = sorted((first, second), key=len)
    if longer.endswith(shorter) and longer[: len(longer) - len(shorter)] in _PREFIXES:
        return True
    return any(
        a.startswith(prefix) and b.startswith(opposite) and a[len(prefix) :] == b[len(opposite) :]
        for a, b in ((first, second), (second, first))
        for prefix, opposite in _OPPOSITES
    )


def without_ending(wsi_id: str) -> str:
    """Return the id without the endings of a slide and a feature file, and without the ".0" of a number."""
    bare = wsi_id
    while _has_ending(bare):
        bare = bare[: -len(Path(bare).suffix)]
    # pandas writes a column of whole numbers with gaps as floats.
    return bare[:-2] if re.fullmatch(r"\d+\.0", bare) else bare


def _has_ending(wsi_id: str) -> bool:
    return is_feature_file(Path(wsi_id)) or is_slide_file(wsi_id) or Path(wsi_id).suffix.lower() in _OTHER_ENDINGS


def without_folder(wsi_id: str) -> str:
    """Return the last component of a POSIX or Windows path."""
    return re.split(r"[/\\]", wsi_id.rstrip("/\\"))[-1]


class NearIds:
    """The existing ids, in which to look up one that differs in spelling."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids: dict[str, set[str]] = {}
        for name in ids:
            for spelling in _spellings(name):
                self._ids.setdefault(spelling, set()).add(name)

    def of(self, wsi_id: str) -> str | None:
        """Return the id that `wsi_id` most likely means by its spelling; None if it could be none or several."""
        for spelling in _spellings(wsi_id):
            ids = self._ids.get(spelling, ())
            if len(ids) == 1:
                return next(iter(ids))
        return None


def _spellings(wsi_id: str) -> dict[str, None]:
    """Return the plain spellings of an id, likeliest first: whole, without endings, and up to the first dot."""
    name = without_folder(wsi_id)
    forms = (name, without_ending(name), name.partition(".")[0])
    return dict.fromkeys(plain_spelling(form) for form in forms if form)


def why_missed(wsi_id: str, near: str) -> str:
    """Return what to do about an id of a table that misses the id `near` by its spelling."""
    bare = without_ending(wsi_id)
    if without_folder(wsi_id) != wsi_id:
        return "write the ids without their folder and ending"
    if _has_ending(wsi_id):
        return f"write the ids without their ending {wsi_id[len(bare) :]}"
    if unicodedata.normalize("NFC", wsi_id) == unicodedata.normalize("NFC", near):
        return "the two hold the same letters in two Unicode forms, composed and decomposed: copy the file's name"
    if near.startswith(f"{wsi_id}."):
        return f"write the ids whole, with {near[len(wsi_id) :]}"
    if re.fullmatch(r"\d+(\.0*)?", bare) and bare != near:
        return "a spreadsheet has made the ids numbers and lost their zeros: format that column as text"
    return "write the ids alike"
