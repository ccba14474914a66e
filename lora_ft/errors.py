"""Every error a user can cause, with its exit code. The form: what, where, why, fix."""

from collections.abc import Iterable
from dataclasses import dataclass

from lora_ft_adapters.errors import did_you_mean, nearest

__all__ = [
    "EXIT_CODES", "ArtifactError", "DataError", "DivergedError", "Interrupted", "LoraFtError", "Problem",
    "ResourceError", "UnsafeError", "UsageError", "did_you_mean", "nearest",
]  # fmt: skip

EXIT_CODES = {
    0: "ok",
    1: "internal bug",
    2: "usage or configuration",
    3: "data",
    4: "model, adapter or artifact does not match, is missing or is corrupt",
    5: "unsafe input refused",
    6: "resource: disk, memory, permission, lock",
    7: "training diverged",
    75: "interrupted, can be resumed",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong and the place it is at, for errors that collect several."""

    what: str
    where: str = ""


class LoraFtError(Exception):
    """Base of all errors that are the user's to mend.

    Args:
        what: the error in one line.
        where: file and line, recipe key or path.
        why: the cause, when it is not plain from `what`.
        fix: what to do.
    """

    exit_code = 1
    family = "INTERNAL"

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __str__(self) -> str:
        lines = [f"error[E-{self.family}]: {self.what}"]
        lines += [f"  {label} {text}" for label, text in self._details() if text]
        return "\n".join(lines)

    def _details(self) -> list[tuple[str, str]]:
        return [("at ", self.where), ("why", self.why), ("fix", self.fix)]

    @classmethod
    def collect(cls, problems: Iterable[Problem], *, title: str = "", why: str = "", fix: str = "") -> "LoraFtError":
        """One error for several problems: the first five in full, the rest counted."""
        found = list(problems)
        if len(found) == 1:
            return cls(found[0].what, where=found[0].where, why=why, fix=fix)
        lines = [f"{p.where}: {p.what}" if p.where else p.what for p in found[:5]]
        if len(found) > 5:
            lines.append(f"... and {len(found) - 5} more")
        return cls(title or f"{len(found)} problems", where="\n      ".join(lines), why=why, fix=fix)


class UsageError(LoraFtError):
    """Wrong command line or recipe: exit 2."""

    exit_code, family = 2, "USAGE"


class DataError(LoraFtError):
    """Data that cannot be read or cannot be trained on: exit 3."""

    exit_code, family = 3, "DATA"


class ArtifactError(LoraFtError):
    """A model, adapter or artifact that is missing, corrupt or belongs elsewhere: exit 4."""

    exit_code, family = 4, "ARTIFACT"


class UnsafeError(LoraFtError):
    """Input that would run code or leave its folder: exit 5."""

    exit_code, family = 5, "UNSAFE"


class ResourceError(LoraFtError):
    """Disk, memory, permission or a lock: exit 6."""

    exit_code, family = 6, "RESOURCE"


class DivergedError(LoraFtError):
    """Loss or gradient is not finite: exit 7."""

    exit_code, family = 7, "DIVERGED"


class Interrupted(LoraFtError):
    """Stopped by a signal after a checkpoint was saved: exit 75."""

    exit_code, family = 75, "INTERRUPTED"
