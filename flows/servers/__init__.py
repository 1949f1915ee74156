"""`slmops up`: Prefect, MLflow and a worker as processes that live together, and the server that a single run starts.

May import `release`, `tracking` and `workspace`.
"""
