"""The certificate of a bundle: for which devices it is good, by what evidence, and a signature that others can check.

May import `release`, `report` and `workspace`.
"""
