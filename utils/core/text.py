"""Text in figures, pages and tables."""

from collections.abc import Sequence

# Printed with each prediction, its pictures and its pages.
NOTICE = "For research, not a diagnosis."


def escape_mathtext(text: str) -> str:
    """Return a text that Matplotlib shows as it is: it would read mathematics between two dollar signs."""
    return text.replace("$", r"\$")


def aligned(blocks: Sequence[Sequence[Sequence[str]]]) -> str:
    """Return blocks of rows as text, with columns aligned at the right and a rule between blocks."""
    rows = [row for block in blocks for row in block]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    texts = [
        ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in block]
        for block in blocks
    ]
    rule = "-" * len(texts[0][0])
    return f"\n{rule}\n".join("\n".join(text) for text in texts if text)


def figure_text(value: float | None) -> str:
    """Return a number with three decimals, "-" if it is undefined."""
    return "-" if value is None else f"{value:.3f}"


def interval_text(limits: Sequence[float] | None) -> str:
    """Return an interval with three decimals, "-" if it is undefined."""
    return "-" if limits is None else f"{limits[0]:.3f}-{limits[1]:.3f}"
