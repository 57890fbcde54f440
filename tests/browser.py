"""A headless browser for tests of pages: run it, watch a page for failures, read colours and pictures."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell", "headless_shell")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
NEEDS_BROWSER = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH; looked for {', '.join(NAMES)}")
DARK = "--blink-settings=preferredColorScheme=0"
READABLE = 4.5  # WCAG 2 AA: contrast of text of this size with what is behind it

WATCH = """<script>
const failures = [];
console.error = (...said) => failures.push(said.join(" "));
addEventListener("error", event => failures.push(event.message || `cannot load ${event.target.src}`), true);
addEventListener("securitypolicyviolation", event => failures.push(`blocked ${event.blockedURI}`));
</script>"""


def browse(page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the browser on a page, with every host name unreachable; its output, the console's messages on stderr."""
    assert BROWSER is not None
    return subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={page.parent / 'profile'}",
            *arguments,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def channels(color: str) -> list[float]:
    return [float(x) for x in re.findall(r"[\d.]+", color)]


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [c / 255 for c in channels(color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def is_drawn_on(shot: Path) -> bool:
    """A blank page leaves few byte values after PNG's row filters; a page with text leaves most of them."""
    png, at, packed = shot.read_bytes(), 8, b""
    while at < len(png):  # chunks: length, name, data, checksum
        size, name = int.from_bytes(png[at : at + 4]), png[at + 4 : at + 8]
        packed += png[at + 8 : at + 8 + size] if name == b"IDAT" else b""
        at += 12 + size
    return len(set(zlib.decompress(packed))) > 128
