"""Checkouts and worktrees: where things lie, who works there (locks, processes), and DVC, which versions what is made.

May import `environment` alone.
"""
