"""The feature passport: how a bag's patches were cut and encoded, carried by its file and by every model trained on it.

`recipe` is what a user chose and is the same for every slide of an extraction; `slide` is what was found and delivered
for one slide; `software` are package versions. Two bags fit together when what is known of both recipes agrees.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from utils.core.recipe import Recipe

SCHEMA = 1


@dataclass(frozen=True)
class Passport:
    """`slide`: name, width, height, mpp, mpp_delivered, patch_size_level0, quick_hash."""

    recipe: Recipe
    slide: dict[str, Any] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        content = {
            "schema": self.schema,
            "recipe": self.recipe.as_dict(),
            "slide": self.slide,
            "software": self.software,
        }
        return json.dumps(content, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Passport":
        """Raises ValueError, KeyError or TypeError for a text that is no passport."""
        content = json.loads(text, parse_constant=_no_number)
        parts = [content[name] for name in ("recipe", "slide", "software")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("recipe, slide or software is not a set of fields")
        recipe, slide, software = parts
        return cls(Recipe.from_dict(recipe), slide, software, content["schema"])


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")
