"""A record that grows while its command works: on disk every few seconds, and once more however the run ends."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parsedec.experiment.record import write_record
from parsedec.models.ranks import leading

log = logging.getLogger(__name__)
SAVE_EVERY_S = 5.0


class GrowingRecord(ABC):
    """What a run has found so far, and the record of it.

    head    the part of the record that is known when the run starts
    path    the record's file; of several processes that share a target (`ranks`), only the first one writes it
    record  the record as it was saved last
    """

    def __init__(self, head: dict[str, Any], path: Path) -> None:
        self.head = head
        self.path = path
        self.record: dict[str, Any] = {}
        self._saved = time.monotonic()

    @abstractmethod
    def contents(self, status: str) -> dict[str, Any]:
        """What the record holds besides its head and its status."""

    @abstractmethod
    def done(self) -> str:
        """What there is so far, in words for the message after Ctrl-C: "12 finished requests"."""

    def save(self, status: str) -> None:
        self.record = self.head | {"status": status} | self.contents(status)
        if leading():
            write_record(self.record, self.path)
        self._saved = time.monotonic()

    def tick(self) -> None:
        """Save if that has not been done for some seconds."""
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save("running")

    @contextmanager
    def saved_at_end(self) -> Iterator[None]:
        """Save once the body has ended, with a status that says how: finished, interrupted (by Ctrl-C) or failed."""
        status = "failed"
        try:
            yield
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            log.warning(
                "interrupted; %s are in %s - resume=true output=%s goes on", self.done(), self.path, self.path.parent
            )
            raise
        finally:
            self.save(status)
