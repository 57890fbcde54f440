"""Lines of a stream of server-sent events, as its bytes come in."""

from __future__ import annotations

import re

END = re.compile(rb"\r\n|\n|\r")  # and no other: U+2028 and U+0085 stand inside an answer as any character does


class EventLines:
    """Cuts bytes into lines, however they arrive. An end that comes in two halves gives one more line, an empty one,
    which means nothing to who looks for `data:`."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []

    def push(self, part: bytes) -> list[bytes]:
        """The lines that `part` ends."""
        *ended, last = END.split(part)
        if ended:
            ended[0] = b"".join([*self._begun, ended[0]])
            self._begun = []
        self._begun.append(last)
        return ended

    def rest(self) -> bytes:
        """What stood behind the last end when the stream was over."""
        return b"".join(self._begun)
