"""What is done: each stage is a function from typed parameters and input folders to one output folder.

Never imports prefect, mlflow, dvc or `flows`. Imports go down only: errors, params, frame, models, then learning and
runtimes, then the stages' rooms, none of which imports another, then stages.
"""
