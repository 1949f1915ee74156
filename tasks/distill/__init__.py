"""Distill: a smaller student, pruned from the teacher, learns what the teacher answers."""
