"""Classes and functions of other people that make models: load one that the user names, and rebuild its checkpoints.

A reference is `path/to/file.py:Class` or `package.module:Class`. Code runs only because the user named it in this
process, by `load` or by passing the class itself: a checkpoint holds a name and a digest, and `trusted` finds what fits
them among what was named.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from MILS.bag_model import BagModel, ModelError, Origin
from MILS.other import OtherModel

# What people call the feature width and the number of outputs; the first name that a signature has is filled in.
WIDTHS = (
    "input_dim", "in_dim", "in_features", "feat_dim", "feature_dim", "features_dim", "dim_in", "in_channels",
    "input_size", "in_size", "input_features", "num_features", "n_features", "d_in", "D_in", "L_in", "in_shape",
    "input_shape",
)  # fmt: skip
OUTPUTS = (
    "num_classes", "n_classes", "out_dim", "output_dim", "num_outputs", "n_outputs", "dim_out", "out_features",
    "output_size", "num_labels",
)  # fmt: skip
# Widths that are shapes, (D,).
_SHAPES = ("in_shape", "input_shape")
# Names in a spec that are not the maker's.
_TAKEN = ("name", "code", "digest", "input_dim", "num_classes")
_PLAIN = (bool, int, float, str, type(None))


class CodeError(ModelError):
    """Code that the user has to name, or that is not what a model was trained with."""


@dataclass(frozen=True)
class OwnCode:
    """A class of models, or a function that makes one, which the user named.

    Attributes
        make: the class or function.
        name: what the model is called, `my_model.Net`.
        code: what names it in a checkpoint, `my_model.py:Net` or `package.module:Net`.
        digest: SHA-256 of the file that it stands in.
        reference: what `load` takes in another process; "" for a class that was passed in Python.
    """

    make: Callable[..., nn.Module]
    name: str
    code: str
    digest: str
    reference: str = ""

    def __call__(self, input_dim: int, num_classes: int, **arguments: Any) -> BagModel:
        """Return a fresh model. Raises ModelError for arguments that do not fit, or that its own code refuses."""
        self._check(arguments)
        filled = self._filled(input_dim, num_classes)
        try:
            module = self.make(**filled, **arguments)
        except ModelError:
            raise
        except Exception as error:
            raise self.told(error, "its constructor") from error
        if not isinstance(module, nn.Module):
            raise ModelError(f"{self.code}: makes a {type(module).__name__}, expected a torch.nn.Module")
        about = {"name": self.name, "code": self.code, "digest": self.digest}
        spec = about | {"input_dim": input_dim, "num_classes": num_classes, **arguments}
        origin = Origin(functools.partial(self, input_dim, num_classes, **arguments), self.code, spec)
        if not isinstance(module, BagModel):
            return OtherModel(module, input_dim, num_classes, self.told, origin)
        module.origin = origin
        return module

    @functools.cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        """Return the maker's parameters by name, their annotations evaluated if they can be."""
        try:
            signature = inspect.signature(self.make, eval_str=True)
        except Exception:  # noqa: BLE001 - annotations may name anything
            signature = inspect.signature(self.make)
        return dict(signature.parameters)

    @property
    def _filled_names(self) -> tuple[str | None, str | None]:
        """Return the parameters of the feature width and of the number of outputs, each None if there is none."""
        width = next((name for name in WIDTHS if name in self._parameters), None)
        return width, next((name for name in OUTPUTS if name in self._parameters), None)

    def _filled(self, input_dim: int, num_classes: int) -> dict[str, Any]:
        width, outputs = self._filled_names
        values: dict[str | None, Any] = {width: (input_dim,) if width in _SHAPES else input_dim, outputs: num_classes}
        return {name: value for name, value in values.items() if name is not None}

    def without_filled(self, given: Mapping[str, Any], input_dim: int, num_classes: int) -> dict[str, Any]:
        """Return given arguments without those that are filled in. Raises ModelError if they are other ones."""
        filled = self._filled(input_dim, num_classes)
        for name, value in filled.items():
            if given.get(name, value) != value:
                raise ModelError(f"{self.code}: {name} is {given[name]!r}, these data need {value!r}; leave it out")
        return {name: value for name, value in given.items() if name not in filled}

    @property
    def options(self) -> dict[str, Any]:
        """Return the hyperparameters with their defaults, `inspect.Parameter.empty` for a required one."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        left_out = (*self._filled_names, *_TAKEN)
        return {p.name: p.default for p in self._parameters.values() if p.kind in named and p.name not in left_out}

    def kind(self, name: str) -> Any:
        """Return the type of a hyperparameter's values, as annotated or else that of its default; `object` for any."""
        annotation, default = self._parameters[name].annotation, self._parameters[name].default
        if annotation is not inspect.Parameter.empty:
            parts = typing.get_args(annotation) if typing.get_origin(annotation) else (annotation,)
            is_union = typing.get_origin(annotation) in (None, typing.Union, types.UnionType)
            return annotation if is_union and all(part in _PLAIN for part in parts) else object
        if isinstance(default, int) and not isinstance(default, bool):
            return int | float  # such as dropout=0
        return type(default) if isinstance(default, bool | float | str) else object

    def _check(self, arguments: Mapping[str, Any]) -> None:
        """Raise ModelError for an unknown argument, and for a required one that is not given."""
        options = self.options
        takes_any = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        unknown = [name for name in arguments if name not in options and (not takes_any or name in _TAKEN)]
        if unknown:
            near = difflib.get_close_matches(unknown[0], options, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            listed = ", ".join(options) or "none beside the width and the number of outputs"
            raise ModelError(f"{self.code} has no hyperparameter {', '.join(unknown)}; it takes {listed}{hint}")
        needed = [name for name, default in options.items() if default is inspect.Parameter.empty]
        if missing := [name for name in needed if name not in arguments]:
            values = " ".join(f"{name}=..." for name in missing)
            raise ModelError(f"{self.code}: needs {', '.join(missing)}; give --mil_args {values}")

    def told(self, error: Exception, where: str) -> ModelError:
        """Return the error that says what the maker's own code raised, and in which line."""
        return ModelError(f"{self.code}: {where} raised {_words(error, _source_file(self.make))}")

    def __reduce__(self) -> tuple[Any, ...]:
        if self.reference:
            return _again, (self.reference, self.digest)
        return _remembered, (self.make, self.name, self.code, self.digest)


# What was named in this process, by qualified name and digest.
_named: dict[tuple[str, str], OwnCode] = {}


def load(reference: str) -> OwnCode:
    """Run the code that a reference names, and return what it makes models with. Raises ModelError."""
    place, _, attribute = reference.rpartition(":")
    if not place or not attribute:
        raise ModelError(f"{reference}: expected path/to/file.py:Class or package.module:Class")
    module = _file_module(Path(place)) if place.endswith(".py") else _package_module(place)
    try:
        make = functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        makers = [name for name, value in vars(module).items() if _makes_modules(value, module.__name__)]
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        has = f"it has {', '.join(makers)}" if makers else "it has no torch.nn.Module"
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ModelError(f"{place}: no {attribute} in it; {has}{hint}") from None
    is_file = place.endswith(".py")
    code = f"{Path(place).name if is_file else place}:{attribute}"
    return _remember(make, code, f"{Path(place).resolve()}:{attribute}" if is_file else reference)


def of_maker(make: Callable[..., nn.Module]) -> OwnCode:
    """Return the code of a class, or a function that makes a module, which was passed in Python. Raises ModelError."""
    name = getattr(make, "__qualname__", "")
    if not name or "<lambda>" in name:
        raise ModelError(
            f"{make!r}: has no name by which a checkpoint could find it; give a class, a function with a name, or "
            "functools.partial(Class, ...)"
        )
    file = _source_file(make)
    place = file.name if file is not None else make.__module__
    return _remember(make, f"{place}:{name}", "")


def _remember(make: Any, code: str, reference: str) -> OwnCode:
    if not callable(make) or (isinstance(make, type) and not issubclass(make, nn.Module)):
        raise ModelError(f"{code}: is no torch.nn.Module and no function that makes one")
    place, _, attribute = code.rpartition(":")
    name = f"{place.removesuffix('.py')}.{attribute.rpartition('.')[2]}"
    return _remembered(make, name, code, _digest(make, code), reference)


def _remembered(make: Any, name: str, code: str, digest: str, reference: str = "") -> OwnCode:
    own = OwnCode(make, name, code, digest, reference)
    key = (make.__qualname__, digest)
    _named.pop(key, None)  # the last one named is the first one found
    _named[key] = own
    return own


def _again(reference: str, digest: str) -> OwnCode:
    """Load the code that another process named, in this one. Raises CodeError if it has changed since."""
    own = next((own for own in _named.values() if (own.reference, own.digest) == (reference, digest)), None) or load(
        reference
    )
    if own.digest != digest:
        raise CodeError(f"{own.code} changed during the run ({digest[:8]} before, {own.digest[:8]} now); put it back")
    return own


def by_name(name: str) -> OwnCode | None:
    """Return the code named last under a model's name, or None."""
    return next((own for own in reversed(_named.values()) if own.name == name), None)


def trusted(code: str, digest: str) -> OwnCode:
    """Return the code that a spec names, if the user named it in this process: nothing is loaded here. Raises CodeError
    unless its file is the same, wherever it lies.
    """
    attribute = code.rpartition(":")[2]
    if (own := _named.get((attribute, digest))) is not None:
        return own
    place = f"path/to/{code}" if ".py:" in code else code
    others = [other for name, other in _named if name == attribute]
    if not others:
        raise CodeError(
            f"was trained with code of your own, {code}, which runs only if you name it again: --mil {place} "
            "(from Python, pass the class or MILS.use_mil)"
        )
    raise CodeError(
        f"was trained with {code} of digest {digest[:8]}, and what you named has {others[-1][:8]}: it changed since; "
        "name the earlier file with --mil, or train again"
    )


def _file_module(path: Path) -> types.ModuleType:
    """Run a Python file as a module of its own; what stands beside it can be imported from it."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    file = path.resolve()
    name = f"{file.stem}_{hashlib.sha256(text).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    module = types.ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module
    try:
        exec(compile(text, str(file), "exec"), module.__dict__)  # noqa: S102 - the user named the file
    except Exception as error:
        del sys.modules[name]
        raise ModelError(f"{path}: cannot be imported: {_words(error, file)}") from error
    return module


def _package_module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ModelError(f"{name}: cannot be imported: {_words(error, None)}") from error


def _makes_modules(value: Any, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module


def _source_file(make: Any) -> Path | None:
    try:
        return Path(inspect.getsourcefile(make) or "")
    except TypeError:  # typed into a notebook
        return None


def _digest(make: Any, code: str) -> str:
    """Return the SHA-256 of the file that a class or function stands in; of its own text where there is no file."""
    file = _source_file(make)
    try:
        if file is not None and file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
        parts = [make] if inspect.isfunction(make) else filter(inspect.isfunction, vars(make).values())
        return hashlib.sha256("".join(map(inspect.getsource, parts)).encode()).hexdigest()
    except (OSError, TypeError):
        raise ModelError(f"{code}: its source cannot be read, so a checkpoint could not record it") from None


def _words(error: Exception, file: Path | None) -> str:
    """Return an error in a line, with the last line of `file` that it came through."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if file and Path(frame.filename) == file]
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text
