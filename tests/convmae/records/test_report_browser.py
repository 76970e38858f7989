"""`report.html` in a browser: drawn, nothing clipped, nothing outside its card, no network."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from convmae.records.report import write_report
from tests.support.paths import ROOT
from tests.support.reports import (
    BROWSER,
    EVIL,
    Image,
    browse,
    in_a_browser,
    loss_lines,
    run_folder,
)

if TYPE_CHECKING:
    from pathlib import Path


@in_a_browser
def test_a_browser_draws_the_curves_and_shows_the_pictures(tmp_path: Path) -> None:
    lines = [*loss_lines(30), {"event": "unreadable", "step": 300, "path": EVIL}]
    folder = run_folder(tmp_path / "run", lines, pictures=3, data_path=EVIL)
    dom, console = browse(write_report(folder), tmp_path / "profile")
    assert console == []
    assert "<title>convmae_tiny: finished</title>" in dom
    curves = re.findall(r'<path class="curve[^"]*"[^>]*? d="(M[^"]*)"', dom)
    assert len(curves) == 2 + 1 + 1 + 3 + 1  # loss twice, lr, norm, three rates, memory
    for curve in curves:
        points = np.array(re.findall(r"[ML](\S+) ([^ML]+)", curve), dtype=float)
        assert len(points) == 30 and np.isfinite(points).all()
        assert (np.diff(points[:, 0]) > 0).all()
        assert points.min() > 0 and points[:, 1].max() < 280
    assert re.search(r'<img id="picture"[^>]* src="data:image/', dom)
    assert "step 30 · epoch 0.30" in dom


@in_a_browser
def test_a_browser_opens_an_empty_report(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    dom, console = browse(write_report(tmp_path / "run"), tmp_path / "profile")
    assert console == [] and "nothing was logged yet" in dom


@in_a_browser
def test_the_page_forbids_the_network(tmp_path: Path) -> None:
    """A page that was made to ask a server for something does not, and says so."""
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    page = write_report(run_folder(tmp_path / "run", loss_lines(3)))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        html = page.read_text().replace(
            "</main>", f'<img src="{url}/image"></main><script>fetch("{url}/fetch")</script>'
        )
        page.write_text(html)
        _, refused = browse(page, tmp_path / "profile")
        page.write_text(html.replace("Content-Security-Policy", "none"))
        browse(page, tmp_path / "profile")
        server.shutdown()
    assert sum("Content Security Policy" in line for line in refused) >= 2
    assert sorted(asked) == ["/fetch", "/image"]  # of the page without the policy alone


@in_a_browser
def test_the_screenshot_of_the_documentation(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    script = shutil.copy(ROOT / "docs" / "report_screenshot.sh", tmp_path / "docs")
    folder = run_folder(tmp_path / "run", loss_lines(30))
    missing = subprocess.run([script, folder], capture_output=True, text=True)
    assert missing.returncode == 1 and "report.html" in missing.stderr
    write_report(folder)
    environment = os.environ | {"CHROMIUM": str(BROWSER), "HEIGHT": "700"}
    subprocess.run([script, folder], env=environment, check=True, capture_output=True)
    with Image.open(tmp_path / "docs" / "report.png") as picture:
        assert picture.size == (1200, 700)
        assert np.asarray(picture.convert("L")).std() > 5
