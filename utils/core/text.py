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


def percent_text(share: float) -> str:
    """Return a share as a percentage with one decimal; neither 0 nor 100% if it is not."""
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.1%}" if share else "0%"


def multiple_text(value: float) -> str:
    """Return a multiple with three digits, or whole from 100 on, and never with an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return "<0.001" if 0 < value < 0.001 else f"{value:.3g}"


def figure_text(value: float | None, sign: str = "") -> str:
    """Return a number with three decimals, "-" if it is undefined; with a `sign` of "+", what is positive has one."""
    return "-" if value is None else f"{value:{sign}z.3f}"


def range_text(limits: Sequence[float] | None, sign: str = "") -> str:
    """Return an interval as two such numbers, "-" if it is undefined."""
    return "-" if limits is None else f"{figure_text(limits[0], sign)} to {figure_text(limits[1], sign)}"


def p_text(p: float | None) -> str:
    """Return a p with three decimals, "-" if it is undefined."""
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def interval_text(limits: Sequence[float] | None) -> str:
    """Return an interval with three decimals, "-" if it is undefined."""
    if limits is None:
        return "-"
    return f"{limits[0]:.3f}-{limits[1]:.3f}" if min(limits) >= 0 else range_text(limits)
