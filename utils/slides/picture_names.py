"""Recognise pictures of slides by name: masks, thumbnails, labels, and the pictures that LiteMIL draws."""

import re
from collections.abc import Collection

# These words make a picture anywhere in the name,
_ANYWHERE = re.compile(r"(masks?|thumb(nail)?s?|previews?|heatmaps?|contactsheets?)\d*")
_PAIRS = re.compile(r" (contact sheets?|patch grid|top patches)\d* ")
# these at its end, or if the rest is a slide's name, since they may be part of a study's name,
_AT_END = re.compile(
    r"(labels?|macros?|overviews?|overlays?|segmentations?|annotations?|detailed|faithfulness|screenshots?)\d*"
)
# and these only if the rest is a slide's name.
_OF_A_SLIDE = re.compile(r"(seg|segm|qc|tissue|contours?|outlines?|snapshots?|icon)\d*")
# May follow a word at the end: a number, a size, a level, a copy.
_AFTER_END = re.compile(
    r"\d+|\d+x\d*|\d+px|(lvl|level|page|v)\d*|l\d+|x\d+|small|large|big|tiny|low|high|(low|high)?res|ima?ge?s?|copy"
    r"|svs|tiff?|png|jpe?g"
)
_SEPARATORS = re.compile(r"[\W_]+|(?<=[a-z])(?=[A-Z])")

Words = tuple[str, ...]


def words_of(name: str) -> Words:
    """Return the words of a name in lower case, split at characters other than letters and digits, and at capitals."""
    return tuple(word.lower() for word in _SEPARATORS.split(name) if word)


def is_picture_name(name: str, slides: Collection[Words] = ()) -> bool:
    """Return whether a name (without its ending) is that of a picture; `slides` are the words of the slides' names.

    Only whole words count: "maskell" is not a mask.
    """
    words = words_of(name)
    if any(_ANYWHERE.fullmatch(word) for word in words) or _PAIRS.search(f" {' '.join(words)} "):
        return True
    for index, word in enumerate(words):
        before, after = words[:index], words[index + 1 :]
        is_last = all(_AFTER_END.fullmatch(following) for following in after)
        if _AT_END.fullmatch(word) and (is_last or before + after in slides):
            return True
        if _OF_A_SLIDE.fullmatch(word) and (before + after in slides or (is_last and before in slides)):
            return True
    return False
