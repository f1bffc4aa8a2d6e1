"""MILDataset: a cohort's slides and labels. It lives in `utils.bags.dataset`."""

from utils.bags.dataset import MILDataset

__all__ = ["MILDataset"]
