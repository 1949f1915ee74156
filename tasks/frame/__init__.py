"""What carries a stage and does not make its result: manifests, events, locks, limits, crashes. A change here redoes no stage.

May import `errors` and `params`.
"""
