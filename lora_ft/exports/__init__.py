"""Artifacts: write them into a staging folder, read them back, compare, and only then publish."""

from .probe_file import PROBES_FILE, read_probes, write_probes
from .publish import answers, check_space, check_target, probe, publish
from .upload import check_repository, push

__all__ = [
    "PROBES_FILE", "answers", "check_repository", "check_space", "check_target", "probe", "publish", "push",
    "read_probes", "write_probes",
]  # fmt: skip
