"""Lines of a stream, however its bytes are cut."""

import pytest

from parsedec.remote.event_lines import EventLines

STREAM = "data: a\u2028b\r\n\r\ndata: c\x85\x0b\x0c\x1cd\rdata: é\n\ndata: end".encode()
LINES = ["data: a\u2028b", "data: c\x85\x0b\x0c\x1cd", "data: é", "data: end"]


@pytest.mark.parametrize("size", range(1, len(STREAM) + 1))
def test_lines_end_where_events_end_them(size):
    lines = EventLines()
    found = [line for i in range(0, len(STREAM), size) for line in lines.push(STREAM[i : i + size])]
    assert [line.decode() for line in [*found, lines.rest()] if line] == LINES
