"""Validate: the shipped file itself, in its own runtime, against the teacher and the F16 student."""
