"""One run of the pipeline under Prefect: its tasks, where they run, and what a person sees of them.

May import every room but `deployed`.
"""
