"""That bf16 products computed in float32 are what the processor's own are, forward and backward, and others stay the same."""

import subprocess
import sys

BOTH_WAYS = """
import torch
from tasks.models import bf16

def products(dtype):
    torch.manual_seed(17)
    wide, bias = torch.nn.Linear(96, 40, bias=False), torch.nn.Linear(96, 40)
    x = torch.randn(3, 32, 96)
    wide, bias, x = wide.to(dtype), bias.to(dtype), x.to(dtype).requires_grad_()
    made = [wide(x), bias(x), bias(x[0]), x @ x.transpose(1, 2)]
    sum(each.float().square().sum() for each in made).backward()
    return [each.detach() for each in (*made, x.grad, wide.weight.grad, bias.weight.grad, bias.bias.grad)]

before = {}
for dtype, step in ((torch.bfloat16, 2**-7), (torch.float32, 1e-6), (torch.float64, 1e-12)):
    before[dtype] = products(dtype), step
kernels = bf16.emulate()
assert bf16.emulate() is kernels
for dtype, (expected, step) in before.items():
    for one, other in zip(expected, products(dtype), strict=True):
        assert other.dtype is dtype
        # A sum that is added up in another order lands on a neighbour at most, seen from the largest value.
        assert (one - other).abs().max() <= step * one.abs().max(), dtype
print("equal")
"""


def test_products_computed_in_float32_are_those_of_the_processor() -> None:
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", BOTH_WAYS], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("equal", 0), done.stderr
