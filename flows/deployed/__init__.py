"""What a form, a schedule or an event starts on a Prefect server: flows, approval in the browser, and what applies them.

The top room: it may import every other one.
"""
