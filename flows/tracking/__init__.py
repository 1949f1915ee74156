"""What MLflow is told of a run, kept on the disk until it was told.

May import `workspace`.
"""
