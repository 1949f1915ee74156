"""bfloat16 on a processor that has no instructions for it, where PyTorch's own products are a hundred times as slow as float32's.

A product of bf16 matrices is added up in float32 and rounded once, as the instructions do it. So that is how it is
computed here: both matrices widened, multiplied in float32, the result rounded.
"""

import warnings
from functools import cache
from typing import Any


@cache
def emulate() -> Any:
    """Replace the CPU's matrix products of this process; those of other types go where they went."""
    import torch

    def mm(a: Any, b: Any) -> Any:
        if a.dtype == torch.bfloat16:
            return (a.float() @ b.float()).bfloat16()
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))

    def bmm(a: Any, b: Any) -> Any:
        if a.dtype == torch.bfloat16:
            return torch.bmm(a.float(), b.float()).bfloat16()
        return torch.bmm(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))

    def addmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
        if a.dtype == torch.bfloat16:
            return torch.addmm(bias.float(), a.float(), b.float(), beta=beta, alpha=alpha).bfloat16()
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))

    kernels = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced
        for kernel in (mm, bmm, addmm):
            kernels.impl(kernel.__name__, kernel, "CPU")
    return kernels  # they count while this lives
