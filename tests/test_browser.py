"""The inspector in a real browser: JupyterLab, headless Chromium, a hand on a slider."""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager

import pytest
from test_inspect import make, picture, rows_of

from unify_rl.inspect.panel import write_notebook
from unify_rl.train.runlog import RunLog

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
IDLE = '.jp-StatusBar-TextItem:has-text("| Idle")'              # a cell that is run earlier is answered by a question for a kernel


@contextmanager
def lab(folder, home):
    "JupyterLab on a folder, with settings of its own; gives its address."
    with closing(socket.socket()) as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    own = {k: str(home / k) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
               "--LabApp.extension_manager=readonly", "--LabApp.news_url=", f"--ServerApp.root_dir={folder}"]
    with open(home / "log", "wb") as log: server = subprocess.Popen(command, env=os.environ | own, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=2).close(); break
            except OSError: time.sleep(0.25)
            assert server.poll() is None, (home / "log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill(); server.wait()


def test_a_slider_is_moved_in_jupyterlab(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if not CHROMIUM: pytest.skip("no Chromium: apt-get install chromium, or any chromium, google-chrome on the PATH")
    folder = make(tmp_path / "run", steps=(1, 2))
    write_notebook(folder)
    (home := tmp_path / "home").mkdir()
    with lab(folder, home) as address, playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1400, height=1100))
        page.goto(f"{address}/lab/tree/inspect.ipynb?reset")
        page.wait_for_selector(IDLE, timeout=90_000)
        page.click("text=Run >> nth=0")
        page.click("text=Run All Cells")
        table = page.locator(".ug table.side")
        table.wait_for(timeout=90_000)
        assert "Changes sides" not in page.inner_text(".ug") and page.locator(".ug .pic img").count() == 4
        slider = page.locator(".widget-hslider", has_text="λ tidy")
        before = [float(x) for x in slider.locator(".widget-readout").all_inner_texts()]
        slider.locator(".noUi-handle").focus()
        for _ in range(60): page.keyboard.press("ArrowRight")
        page.wait_for_selector(".ug .note:has-text('Changes sides')", timeout=30_000)
        after = [float(x) for x in slider.locator(".widget-readout").all_inner_texts()]
        assert after[0] > before[0] == 0.5
        page.select_option(".widget-dropdown:has-text('groups of') select", "all steps")
        page.wait_for_function("document.querySelectorAll('.widget-select select option').length == 4", timeout=30_000)
        page.select_option(".widget-dropdown:has-text('groups of') select", "this step")
        page.click(".widget-toggle-button:has-text('follow')")
        RunLog(folder, resume=True).log_groups(3, rows_of(2) + rows_of(2, 1), [picture(i % 4) for i in range(8)])        # the run goes on
        page.wait_for_selector(".ug small:has-text('step 3')", timeout=30_000)
        assert "3 steps, 1 new" in page.inner_text(".jp-OutputArea-output")
        assert [float(x) for x in slider.locator(".widget-readout").all_inner_texts()] == after                             # the slider stays
        moment = page.locator(".widget-hslider", has_text="moment")
        moment.locator(".noUi-handle").focus()
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector(".ug svg.cover", state="attached", timeout=30_000)
        browser.close()
