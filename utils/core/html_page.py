"""Self-contained HTML pages, each from a Jinja template beside the code that fills it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.core.files import write_text


def write_page(path: Path, template: Path, values: Mapping[str, Any]) -> None:
    """Write the page `template` to `path`, filled with the values, whose text is escaped.

    Raises jinja2.UndefinedError if a value that the template needs is missing.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    write_text(path, environment.get_template(template.name).render(values))
