"""Words of users in figures."""


def literal(text: str) -> str:
    """A text that Matplotlib shows as it is: between two dollar signs it would read mathematics."""
    return text.replace("$", r"\$")
