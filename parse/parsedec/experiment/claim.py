"""Claims on output folders: one process at a time may write in a folder, by a lock on a file beside the record.

A folder without a record need not be free: another run may have begun there and not have saved yet. The lock is the
operating system's, so a process that was killed leaves none behind.
"""

from __future__ import annotations

import atexit
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parsedec.errors import OutputExistsError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
_held: dict[Path, int] = {}  # the descriptors of this process' locks, by file


def claim(record: Path) -> None:
    """Make this process the only one that writes `record`, until `release` or its end. It may claim twice.

    Threads of one process share its claim. Raises OutputExistsError while another process has the claim.
    """
    path = _beside(record)
    if fcntl is None or path in _held:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _held[path] = _locked(path)
    except BlockingIOError as error:
        raise OutputExistsError(
            f"{record.parent} is being written by another run ({_owner(path)}); a run never overwrites one. Wait until "
            "that has ended and add resume=true, end it, or choose another folder (output=DIR)."
        ) from error
    except OSError as error:  # a folder that is only read, as of a finished run; a file system without locks
        log.info("%s cannot be locked (%s): that no other run writes there is not known", record.parent, error)


def release(record: Path) -> None:
    """Give up a claim and remove its file, if there is one."""
    path = _beside(record)
    if (descriptor := _held.pop(path, None)) is not None:
        path.unlink(missing_ok=True)  # before the lock goes: whoever comes next makes a file of its own
        os.close(descriptor)


@contextmanager
def released_on_error(record: Path) -> Iterator[None]:
    """Give up a claim where the body fails: nothing more is written then."""
    try:
        yield
    except BaseException:
        release(record)
        raise


@atexit.register
def _release_all() -> None:
    for path in list(_held):
        release(path.with_suffix(""))


def _beside(record: Path) -> Path:
    return record.resolve().with_name(f"{record.name}.lock")


def _locked(path: Path) -> int:
    """A descriptor that holds the lock of `path`. Raises BlockingIOError if another process does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # its last owner may have removed the file between our opening and locking it
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _owner(path: Path) -> str:
    """What the owner of a lock wrote into its file."""
    try:
        return path.read_text() or "which has only just begun"
    except OSError:
        return "which is about to end"
