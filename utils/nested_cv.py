"""NestedCrossValidation: nested, patient-level cross-validation. It lives in `utils.learning.cross_validation`."""

from utils.learning.cross_validation import NestedCrossValidation

__all__ = ["NestedCrossValidation"]
