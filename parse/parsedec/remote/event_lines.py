"""The lines of a stream of server-sent events, from its bytes as they arrive."""

from __future__ import annotations

import re

END = re.compile(rb"\r\n|\n|\r")  # no others: U+2028 and U+0085 may be characters of an answer


class EventLines:
    """Cuts bytes into lines, however they arrive. A line end that comes in two halves gives an extra empty line, which
    does not matter to a reader that looks for `data:`."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []

    def push(self, part: bytes) -> list[bytes]:
        """The lines that end in `part`."""
        *ended, last = END.split(part)
        if ended:
            ended[0] = b"".join([*self._begun, ended[0]])
            self._begun = []
        self._begun.append(last)
        return ended

    def rest(self) -> bytes:
        """What was left behind the last line end when the stream was over."""
        return b"".join(self._begun)
