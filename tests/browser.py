"""A page in headless Chromium."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NASTY = "<script>window.broken = 1</script>"


CHROMIUM = shutil.which("chromium")


browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")


def in_browser(page: Path, script: str, tmp_path: Path) -> dict:
    """What `script` leaves in document.title as JSON after it ran at the end of the page in headless
    Chromium."""
    copy = tmp_path / "page.html"
    nonce = re.search(r"'nonce-([\w-]+)'", page.read_text())
    assert nonce
    late = (
        f'<script nonce="{nonce[1]}">'
        + f"window.addEventListener('load', () => setTimeout(async () => {{ {script} }}, 300));</script>"
    )
    copy.write_text(page.read_text().replace("</body>", f"{late}</body>"))
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
        --disable-background-networking --disable-component-update --disable-sync
        --virtual-time-budget=20000 --window-size=1240,2400 --dump-dom""".split()
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found and found[1].startswith("{"), done.stdout[-500:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
