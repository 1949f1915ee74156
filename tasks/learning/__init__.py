"""How a model learns and answers in torch: packing rows, the training loop, generation.

May import `models` and `frame`.
"""
