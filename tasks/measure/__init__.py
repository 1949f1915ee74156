"""Measure: speed and memory of the shipped file on each kind of device that params.yaml names."""
