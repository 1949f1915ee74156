"""Scripts that run under the interpreter of a runtime's own environment. They import nothing of ours, so that they work there,
and on a device that they are copied to.
"""
