"""The result of a run: its rows, tables, charts and the HTML page.

Imports `tasks` alone.
"""
