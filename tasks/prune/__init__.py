"""Prune: the teacher without its least important blocks and channels, as the start of every student."""
