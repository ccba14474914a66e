"""Artifacts: write them into a staging folder, read them back, compare, and only then publish."""

from .probe_file import PROBES_FILE, read_probes, write_probes
from .publish import check_target, probe, publish

__all__ = ["PROBES_FILE", "check_target", "probe", "publish", "read_probes", "write_probes"]
