"""Cells of tables that stand for an unknown value."""

import unicodedata

# How tables write an unknown value, in lower case without brackets and quotes.
_PLACEHOLDERS = {
    "", "-", "--", "---", ".", "?", "??", "na", "n/a", "n.a.", "n.a", "#n/a", "<na>", "nan", "none", "null", "nil",
    "unknown", "unk", "missing", "not available", "not applicable", "not reported", "not known", "not specified",
    "not determined", "undefined", "unspecified", "tbd", "#value!", "#ref!", "pd.na", "n.d.", "n.d", "no data",
    "not assessed", "not evaluated", "not evaluable", "not done", "not tested", "not recorded", "not provided",
    "not given", "not performed", "not collected", "unkown", "unknow", "unknwon", "unknonw", "unspecifed", "empty",
    "undetermined", "discrepancy", "-999", "-9999",
}  # fmt: skip


def is_placeholder(text: str) -> bool:
    """Return whether the text stands for an unknown value: "NA", "nan", "[Not Available]", "unknown"."""
    plain = unicodedata.normalize("NFKC", text).casefold().strip("[]()'\" \t")
    return " ".join(plain.split()) in _PLACEHOLDERS
