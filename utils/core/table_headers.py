"""The column headers of users' tables."""

import re

# Other names of the column of slides, without case, blanks and separators; those in the first line come first.
SLIDE_NAMES = (
    "wsiid wsi wsiname wsifile slideid slide slidename slidefile slidebarcode slidesubmitterid",
    "imageid image imagename imagefile filename file",
)
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def plain_header(header: str) -> str:
    """Return the header without case, blanks and separators, and without the "cases." of the GDC's tables."""
    return re.sub(r"[\s_.\-]+", "", re.sub(r"^cases\.(\d+\.)?", "", header.casefold()))
