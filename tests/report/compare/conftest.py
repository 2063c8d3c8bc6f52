"""Run directories made of numbers that a test chooses."""

from curve_fixtures import make_run

__all__ = ["make_run"]
