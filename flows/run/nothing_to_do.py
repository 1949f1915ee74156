"""A run that finds everything up to date: it ends what a run ends with, without a server, a flow or a record of its own."""

from flows.release import registration
from flows.report import results
from flows.report.page import write_report
from flows.run.terminal import Display
from flows.tracking import spool
from flows.workspace import paths, worktrees
from flows.workspace.paths import Workspace
from tasks.frame.stage import folder
from tasks.params import Params


def left_by_a_run(root: Workspace) -> bool:
    """Did a run end without closing its records? The next one closes them, and is a whole run for it."""
    return bool(spool.left(worktrees.main_root(root)))


def end(root: Workspace, checked: Params) -> str:
    """Show the result in the workspace `root`, write its report, and register the bundle if no run did. Returns what came of
    the registration, for a person.

    Raises:
        ArtifactError: the bundle does not match its manifest.
        StageError: the MLflow server does not answer.
    """
    Display().table(results.rows(root, checked))
    write_report(folder(root, "package"), folder(root, "select"), paths.report(root), params=checked)
    duties = checked.release.separate_duties
    _, said = registration.register_if_passed(root, worktrees.main_root(root), separate_duties=duties)
    return said
