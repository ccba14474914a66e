"""Artifacts: write them into a staging folder, read them back, compare, and only then publish."""

from .publish import check_target, probe, publish

__all__ = ["check_target", "probe", "publish"]
