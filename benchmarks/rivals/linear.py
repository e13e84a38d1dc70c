"""`linear` of quack: products by CuTe instead of cuBLAS."""

from benchmarks.rivals import gpu, needs, package


@needs(gpu, package("quack"))
def quack(x, weight, bias):
    from quack.linear import linear_func

    return linear_func(x, weight, bias)


RIVALS = {"quack": quack}
