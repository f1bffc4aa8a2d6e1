"""The flags of each model for `--help`, read from the source text: importing the models with PyTorch takes seconds."""

import ast
from pathlib import Path
from typing import Any


def model_help(folder: Path) -> str:
    """Return the flags of each model that the files in `folder` register, with the model's own defaults."""
    lines = ["each model's hyperparameters and their defaults:"]
    for name, options in keyword_defaults(folder, "register_mil").items():
        lines.append(f"  {name:16} " + "  ".join(_flag(option, default) for option, default in options.items()))
    return "\n".join(lines)


def _flag(option: str, default: Any) -> str:
    if isinstance(default, bool):
        return f"--{option}" if default else f"--no-{option}"
    return f"--{option} {default}"


def keyword_defaults(folder: Path, decorator: str) -> dict[str, dict[str, Any]]:
    """Return the keyword-only arguments of `__init__`, with their defaults, of each class with the decorator in the
    folder's files, in order.
    """
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: _defaults(node) for node in classes if decorator in map(ast.unparse, node.decorator_list)}


def _defaults(node: ast.ClassDef) -> dict[str, Any]:
    init = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    return {argument.arg: ast.literal_eval(default) for argument, default in pairs if default is not None}
