"""What a person sees of a run on Prefect's pages: the result, plots, links that open from there, and errors as sentences."""

import base64
import logging
from collections.abc import Sequence

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact

from flows.report import results
from flows.report.page import plots
from flows.tracking import mlflow_runs
from flows.workspace import worktrees
from flows.workspace.paths import Workspace
from tasks.errors import PipelineError
from tasks.frame.stage import folder


def show(root: Workspace, name: str, rows: Sequence[results.Row], registered: str) -> str | None:
    """Put the result of the run in the workspace `root` on the page of the flow run that calls this. Returns the address of
    MLflow's page of it, where a server shows one.
    """
    text = f"{results.markdown(rows)}\n\n{registered}\n\n{links(root)}"
    create_markdown_artifact(text, key="result", description=f"Result of run {name}")
    for key, (title, svg) in plots(folder(root, "package"), folder(root, "select")).items():
        picture = base64.b64encode(svg.encode()).decode()
        create_image_artifact(f"data:image/svg+xml;base64,{picture}", key=key, description=title)
    pages = mlflow_runs.pages(worktrees.main_root(root), root)
    if pages:
        create_link_artifact(pages[1], "Report", key="report", description="report.html, as MLflow keeps it")
    return pages[0] if pages else None


def links(root: Workspace) -> str:
    """Where a run's report and its numbers are, in Markdown. A browser opens no file:// link from a page of a server."""
    pages = mlflow_runs.pages(worktrees.main_root(root), root)
    if not pages:
        return f"The report is the file `{root / 'report.html'}`."
    run, report = pages
    return f"[Report]({report}) · [Run in MLflow]({run})"


def plain_errors() -> None:
    """From now on the log of a run tells an error of ours in its own words, without the traceback of how it got there."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], PipelineError):
        record.exc_info = None
    return True
