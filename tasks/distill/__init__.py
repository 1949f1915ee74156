"""Distill: the pruned teacher learns from the teacher's targets, once a seed."""
