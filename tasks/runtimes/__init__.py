"""The runtimes of the edge, one file each: answers, window logits, timing.

May import `models` and `frame`.
"""
