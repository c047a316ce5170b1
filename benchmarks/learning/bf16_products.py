"""
Products of bfloat16 matrices on a CPU that has no instructions for them: the numbers of one that has, at the speed of float32.

This emulates how such hardware rounds. It says nothing of how fast that hardware is. It needs PyTorch 2.9.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch as th
from torch.library import Library

# All that linear layers, stacked or composed, come down to, in both directions
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def _multiply(
    own_kernel: Any, counts: dict[str, int], product: str, keys: Any, *operands: th.Tensor, **scalars: float
) -> th.Tensor:
    """What computes a product instead of PyTorch's kernel, which gets all types but bfloat16 as they are."""
    if operands[0].dtype != th.bfloat16:
        return own_kernel.call_boxed(keys, *operands, **scalars)
    counts[product] += 1
    # Exact factors, a sum in float32, and one rounding of that, as matrix units with a float32 accumulator do
    exact = [operand.float() for operand in operands]
    return own_kernel.call_boxed(keys, *exact, **scalars).bfloat16()


@contextmanager
def emulated_bf16_products() -> Iterator[dict[str, int]]:
    """
    Within it, products of bfloat16 matrices on the CPU are products in float32 of the same entries, rounded to bfloat16.

    That holds for the whole process, in the backward pass, too. What is not a product, and products of other types, are
    PyTorch's own as before.

    :return: How many products of each kind were computed so far, by name
    """
    counts = dict.fromkeys(PRODUCTS, 0)
    own_kernels = {product: th.library.get_kernel(f"aten::{product}", "CPU") for product in PRODUCTS}
    library = Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # on purpose
            for product, kernel in own_kernels.items():
                library.impl(product, partial(_multiply, kernel, counts, product), "CPU", with_keyset=True)
        yield counts
    finally:
        library._destroy()
