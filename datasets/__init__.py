"""Cohorts, each in a folder of its own (see README.md)."""
