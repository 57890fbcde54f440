"""Checksums of the models that ship with parsedec, in the format of `sha256sum`.

python -m parsedec.training.checksums            rewrite zoo/CHECKSUMS after a file there has changed
cd parse/parsedec/zoo && sha256sum -c CHECKSUMS  check them without Python
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

from parsedec.experiment.record import write_text

ZOO = Path(str(files("parsedec") / "zoo"))
NAME = "CHECKSUMS"


def shipped(folder: Path = ZOO) -> list[Path]:
    """Every file below `folder` except documents, hidden files and the list itself, sorted by path."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md" and path.name != NAME)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def digests(folder: Path = ZOO) -> dict[str, str]:
    """sha256 of every shipped file, by its path below `folder`."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in shipped(folder)}


def write_checksums(folder: Path = ZOO) -> Path:
    """Write `folder`/CHECKSUMS; returns its path."""
    lines = [f"{digest}  {name}\n" for name, digest in digests(folder).items()]
    return write_text("".join(lines), folder / NAME)


def sha256(path: Path) -> str:
    """The sha256 of a file, in lower-case hexadecimal digits."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


if __name__ == "__main__":
    print(write_checksums())
