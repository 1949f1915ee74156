"""The pictures of docs/, taken anew: `python docs/screenshots.py`. Needs Debian's `chromium`.

In a clone of this checkout's last commit, in a temporary folder, `slmops up` starts and `train-and-release` runs:
what DVC has in the cache is restored, so after `make run` it takes a minute or two and shows that run's numbers.
Chromium, without a window, is told what to do by its DevTools protocol. Nothing is left but the pictures.
"""

import argparse
import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from websockets.sync.client import ClientConnection, connect

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from checkout import ask, free_ports, wait_for  # noqa: E402

DEADLINE_S = 300.0  # for an answer of Chromium's
RUN_S = 7200.0  # for a run, should nothing of it be in the cache
COLOURS = 255


# --- the browser ----------------------------------------------------------------------------------


class Page:
    """One tab of a Chromium without a window."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._last = socket, 0

    def _call(self, method: str, **params: Any) -> Any:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=DEADLINE_S))
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        told = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return told["result"].get("value")

    def open(self, url: str, *texts: str, width: int = 1280, height: int = 800) -> None:
        """Load a page and wait until it shows the texts."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._call("Page.navigate", url="about:blank")  # a new fragment alone would load nothing
        self._call("Page.navigate", url=url)
        self.wait(*texts)

    def wait(self, *texts: str) -> None:
        """Wait until the page shows the texts."""
        for text in texts:
            wait_for(lambda text=text: self.ask(f"document.body.innerText.includes({json.dumps(text)})"), f"{text!r}")

    def click(self, text: str) -> None:
        """Click what reads so: the innermost element that is seen."""
        find = f"""[...document.querySelectorAll('body *')].filter(
            each => each.innerText?.trim() === {json.dumps(text)} && each.getClientRects().length).pop()"""
        wait_for(lambda: self.ask(f"!!({find})"), f"a button {text!r}")
        self.ask(f"({find}).click()")

    def picture(self, path: Path, height: int | None = None) -> None:
        """Keep what is seen, settled, in few colours: cut or stretched to `height`."""
        if height:
            width = self.ask("innerWidth")
            self._call(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
        before, since = b"", time.monotonic()
        while True:  # until two looks, a moment apart, are the same
            seen = base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])
            if seen == before or time.monotonic() - since > 15:
                break
            before = seen
            time.sleep(0.5)
        image = Image.open(io.BytesIO(seen)).convert("RGB")
        image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}  {path.stat().st_size / 1e3:.0f} kB", flush=True)


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A Chromium with a profile of its own."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if not binary:
        sys.exit("error: there is no chromium: install Debian's package of that name")
    # --no-sandbox: Chromium's own does not work for root; it opens nothing but our servers' pages.
    options = [
        "--headless",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    ]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    process = subprocess.Popen([binary, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ready = folder / "DevToolsActivePort"
        wait_for(lambda: ready.exists() and len(ready.read_text().splitlines()) == 2, "Chromium's port")
        port = ready.read_text().splitlines()[0]
        tab = next(each for each in ask(f"http://127.0.0.1:{port}/json/list") if each["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as link:
            yield Page(link)
    finally:
        process.terminate()
        process.wait()


# --- the servers ----------------------------------------------------------------------------------


def clone(folder: Path, cache: Path) -> Path:
    """This checkout's last commit, with `cache` as its DVC cache."""
    root = folder / "slmops"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(root)], check=True)
    for key, value in (("user.name", "slmops"), ("user.email", "slmops@localhost")):
        subprocess.run(["git", "config", key, value], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "cache", "dir", "--local", str(cache)], cwd=root, check=True)
    return root


@contextmanager
def servers(root: Path, home: Path) -> Iterator[dict[str, str]]:
    """`slmops up` in a checkout, on free ports: what .runs/servers.json tells of it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    env |= {"PREFECT_HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))}
    ports = [f"--{name}-port={port}" for name, port in zip(("prefect", "mlflow"), free_ports(), strict=True)]
    command = [sys.executable, "-m", "flows.cli", "up", *ports]
    process = subprocess.Popen(command, cwd=root, env=env)
    try:
        state = root / ".runs" / "servers.json"
        wait_for(lambda: state.exists() or process.poll() is not None, "the servers", 600)
        if process.poll() is not None:
            sys.exit(f"error: `slmops up` ended with {process.returncode}")
        yield json.loads(state.read_bytes())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def start_run(prefect: str, parameters: dict[str, Any]) -> tuple[str, str]:
    """Start `train-and-release`; ids of the deployment and of the run."""
    found = ask(f"{prefect}/api/deployments/filter", {"deployments": {"name": {"any_": ["train-and-release"]}}})
    deployment = found[0]["id"]
    asked = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    return deployment, ask(f"{prefect}/api/deployments/{deployment}/create_flow_run", asked)["id"]


def wait_for_run(prefect: str, run: str, *states: str) -> str:
    """Wait until a run is in one of these states, and return its name; end if it comes to a bad end."""

    def there() -> bool:
        found = ask(f"{prefect}/api/flow_runs/{run}")
        if found["state_type"] in ("FAILED", "CRASHED", "CANCELLED"):
            sys.exit(f"error: the run ended as {found['state_name']}: {found['state']['message']}")
        return found["state_name"] in states

    wait_for(there, f"the run to be {' or '.join(states)}", RUN_S)
    return str(ask(f"{prefect}/api/flow_runs/{run}")["name"])


# --- the pictures ---------------------------------------------------------------------------------


def take(page: Page, root: Path, state: dict[str, str], out: Path, parameters: dict[str, Any]) -> None:
    """All pictures, of one run from its form to its report."""
    prefect, mlflow = state["prefect"], state["mlflow"]
    deployment, run = start_run(prefect, parameters)
    page.open(f"{prefect}/deployments/deployment/{deployment}/run", "Run Name", "Any parameter by its dotted name")
    page.picture(out / "form.png", 1600)

    name = wait_for_run(prefect, run, "Suspended")
    page.open(f"{prefect}/runs/flow-run/{run}", "Suspended", "Job Variables")
    page.click("Resume")
    page.wait("Your name")
    page.picture(out / "approval.png", 1000)

    answer = {"decision": "approve", "name": "Ada", "reason": "passed all gates"}
    ask(f"{prefect}/api/flow_runs/{run}/resume", {"run_input": answer})
    wait_for_run(prefect, run, "Completed")
    page.open(f"{prefect}/runs/flow-run/{run}", "Completed", "Job Variables")
    page.click("Artifacts")
    page.wait("Result of run")
    page.picture(out / "run.png", 1500)
    (result,) = ask(f"{prefect}/api/artifacts/latest/filter", {"artifacts": {"key": {"any_": ["result"]}}})
    page.open(f"{prefect}/artifacts/artifact/{result['latest_id']}", "of the teacher's")
    page.picture(out / "result.png", 900)

    (place,) = ask(f"{mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 9, "filter": "name = 'slmops'"})[
        "experiments"
    ]
    runs = f"{mlflow}/#/experiments/{place['experiment_id']}/runs?workflowType=machine_learning"
    page.open(runs, name, width=1400)
    page.ask("localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')")  # it hides a third of the page
    page.open(runs, name, width=1400)
    page.picture(out / "mlflow-runs.png", 800)
    settings = {**parameters.get("settings", {}), "package.choose": "most_accurate"}
    _, other = start_run(prefect, {**parameters, "settings": settings})
    wait_for_run(prefect, other, "Suspended", "Completed")  # completed: it makes the champion again
    body = {"experiment_ids": [place["experiment_id"]], "filter": "tags.`slmops.stage` = 'run'"}
    ids = [each["info"]["run_id"] for each in ask(f"{mlflow}/api/2.0/mlflow/runs/search", body)["runs"]]
    where = f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps([place['experiment_id']]))}"
    page.open(f"{mlflow}/#/compare-runs?{where}&workflowType=machine_learning", "accuracy_retention", width=1400)
    page.picture(out / "mlflow-compare.png", 1100)

    report = (root / ".runs" / name / "report.html").as_uri()
    page.open(report, "What next", width=1120)
    page.picture(out / "report.png", 1900)
    page.open(report, "What next", width=390)
    page.picture(out / "report-phone.png", 1500)

    command = [sys.executable, "-m", "flows.cli", "certify", "--champion", "--out", root / "certificate"]
    subprocess.run(command, cwd=root, check=True, env=os.environ | {"PYTHONPATH": str(root)})
    certificate = (root / "certificate" / "certificate.html").as_uri()
    page.open(certificate, "Not measured", width=1120)
    page.picture(out / "certificate.png", 1500)
    page.open(certificate, "Not measured", width=390)
    page.picture(out / "certificate-phone.png", 1700)


def main() -> None:
    """Parse the command line and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=ROOT / ".dvc" / "cache", help="the DVC cache to restore from")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where the pictures go")
    parser.add_argument(
        "--parameters", type=json.loads, default={}, metavar="JSON", help="of the run, as its form has them"
    )
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="slmops-pictures-", ignore_cleanup_errors=True) as folder:
        root = clone(Path(folder), chosen.cache.resolve())
        with servers(root, Path(folder) / "prefect") as state, chromium(Path(folder) / "browser") as page:
            take(page, root, state, chosen.out, chosen.parameters)


if __name__ == "__main__":
    main()
