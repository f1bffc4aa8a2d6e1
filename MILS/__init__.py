"""Bag models for multiple-instance learning, in pure torch: `build_mil(name, input_dim=..., num_classes=...)`."""

# The order of import is the order of registration, and of list_mils(); sorted, it would be another.
# isort: off
from MILS import LiteMIL, MABMIL, TransMIL, pool  # noqa: F401
from MILS.bag_model import BagModel, ModelError
from MILS.own_code import CodeError
from MILS.registry import build_mil, list_mils, mil_factory, mil_kinds, mil_name, mil_options, register_mil, use_mil
# isort: on

__all__ = [
    "BagModel", "CodeError", "ModelError", "build_mil", "list_mils", "mil_factory", "mil_kinds", "mil_name",
    "mil_options", "register_mil", "use_mil",
]  # fmt: skip
