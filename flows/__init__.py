"""When, where and by whom the stages of `tasks` are run. The only code that knows Prefect, MLflow and DVC.

Imports between its rooms go down only: cli, deployed, run, servers, preflight, release, then tracking, report and
workspace, then environment.
"""
