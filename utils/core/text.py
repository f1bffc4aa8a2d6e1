"""Words in figures, pages and tables."""

from collections.abc import Sequence

# What each prediction, its pictures and its pages carry.
NOTICE = "For research, not a diagnosis."


def literal(text: str) -> str:
    """A text that Matplotlib shows as it is: between two dollar signs it would read mathematics."""
    return text.replace("$", r"\$")


def aligned(blocks: Sequence[Sequence[Sequence[str]]]) -> str:
    """Return blocks of rows as text, the columns flush right, with a rule between the blocks."""
    rows = [row for block in blocks for row in block]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    texts = [
        ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in block]
        for block in blocks
    ]
    rule = "-" * len(texts[0][0])
    return f"\n{rule}\n".join("\n".join(text) for text in texts if text)
