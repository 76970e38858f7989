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
import pytest

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

pytestmark = pytest.mark.thorough(but_every=5)  # a sample of long sweeps


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


MEASURE = ROOT / "tests" / "support" / "report_measure.js"


def strange_runs() -> dict[str, list[dict[str, Any]]]:
    """Logs whose numbers and texts are hard to place."""
    long = "very_long_" * 30
    tall = [
        {
            **{"step": 123456789 + i, "epoch": 0.1, "loss": 1e30 * (1 + i), "seconds": 1e7},
            **{"lr": -1.2345e-11 * (i + 1), "grad_norm": 1.00000123 + 1e-9 * i},
            **{"images_per_s": 12345678.9, "model_images_per_s": 1.5e9},
            **{"input_images_per_s": 1.23e-5, "memory_mib": 99999999.0},
        }
        for i in range(5)
    ]
    one = {"step": 1, "epoch": 1.0, "loss": 1.0321, "lr": 0.0, "images_per_s": 1.29}
    wide = [loss | {"loss": 10.0 ** (i - 12)} for i, loss in enumerate(loss_lines(24))]
    failed: dict[str, Any] = {"event": "failed", "step": 300, "reason": f"in /{long}: {EVIL}"}
    unreadable: dict[str, Any] = {"event": "unreadable", "step": 0, "path": long, "reason": EVIL}
    marks = [{"event": "nonfinite", "step": step} for step in (123456793, 123456793)]
    return {
        "failed": [unreadable, *loss_lines(29), {"event": "nonfinite", "step": 299}, failed],
        "extreme": [*tall, *marks],
        "one step": [one],
        "none": [],
        "tiny changes": [one | {"step": i, "loss": 1 + 1e-4 * i} for i in range(1, 9)],
        "long numbers": [
            one | {"step": i, "lr": -1.2345e-17 * (1 + 1e-4 * i)} for i in range(1, 9)
        ],
        "decades": wide,
        "long event": [*loss_lines(2), {"event": long, "step": 20, long: long}],
    }


@in_a_browser
@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", strange_runs())
def test_nothing_is_clipped_or_outside_its_card(
    tmp_path: Path, name: str, width: int, log_scale: bool
) -> None:
    folder = run_folder(
        tmp_path / "run", strange_runs()[name], pictures=2, data_path="/data/" + "folder_" * 40
    )
    page = write_report(folder)
    measure = f"const logScale = {str(log_scale).lower()};\n{MEASURE.read_text()}"
    html = page.read_text().replace("</body>", f"<script>{measure}</script></body>")
    page.write_text(html)
    frame = tmp_path / "frame.html"  # a window cannot be as narrow as a telephone
    frame.write_text(f'<iframe src="run/report.html" width="{width}" height="4000"></iframe>')
    _, console = browse(frame, tmp_path / "profile")
    assert len(console) == 1 and "measured" in console[0], "\n".join(console)
