"""What can be known before any work: the plan of a run, what this machine lacks, steps that a model does not allow.

May import `report`, `tracking` and `workspace`.
"""
