"""Words in figures and pages."""

# What each prediction, its pictures and its pages carry.
NOTICE = "For research, not a diagnosis."


def literal(text: str) -> str:
    """A text that Matplotlib shows as it is: between two dollar signs it would read mathematics."""
    return text.replace("$", r"\$")
