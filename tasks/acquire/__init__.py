"""Acquire: model and data from where they come, checked, split and written down with their lineage."""
