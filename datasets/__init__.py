"""The cohorts: one folder each (see README.md)."""
