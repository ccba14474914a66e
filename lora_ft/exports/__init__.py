"""Artifacts: write them into a staging folder, read them back, compare, and only then publish."""

from .publish import probe, publish

__all__ = ["probe", "publish"]
