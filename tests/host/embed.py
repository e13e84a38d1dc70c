"""embed in csrc/cuda: examples of its kernels' own regimes, what else must hold, faults to be found."""

import torch

from electra_fast.testing.examples import Example

OP = "embed"
TABLES = ("word", "position", "type", "norm_weight", "norm_bias")


def example(ids, E, V=40, dtype=torch.float32, dropout=0.1, **options):
    g = torch.Generator().manual_seed(E)
    rows = {"word": V, "position": ids.shape[-1] + 2, "type": 3}
    args = {name: torch.randn(n, E, generator=g).to(dtype) for name, n in rows.items()}
    args |= {"norm_weight": torch.rand(E, generator=g) + 0.5, "norm_bias": torch.randn(E, generator=g)}
    args |= {"ids": ids, "type_ids": ids % 3, "position_ids": None, "eps": 1e-12, "dropout": dropout}
    args |= {"rng": torch.tensor([5, 6]), "stream": 2, **options}
    return Example(OP, f"{list(ids.shape)} E={E} V={V} {dtype}", args, TABLES)


def some(*shape, of=40):
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(0))


HALF = torch.bfloat16
EXAMPLES = [
    # Rows of a lane, of part of a warp, of a warp, of a warp with 24 columns a lane, of several warps.
    *(example(some(2, 3), E) for E in (1, 31, 128, 768, 1024)),
    *(example(some(2, 3), E, dtype=HALF) for E in (33, 768, 4096)),
    # Two ids with so many places, 13 in 40 each, that the whole block adds up their pieces.
    example(
        torch.tensor([3, 5, *[3, 5] * 12, *range(14)])[some(17, 100)], 6, type_ids=None, return_word=True
    ),
    # Groups of tokens that are no places, more than one block's rows of each; keys that need 32 bits.
    example(some(70, of=2**15), 4, V=2**15, position_ids=some(70, of=72)),
]


def backward(function, args, dy, **more):
    """Return y and the tables' gradients for y's. Tensors go in as they lie in memory."""
    args = {**args, **more}
    leaves = [args[name].detach().requires_grad_() for name in TABLES]
    y = function(**{**args, **dict(zip(TABLES, leaves, strict=True))})
    return y, dict(zip(TABLES, torch.autograd.grad(y, leaves, dy), strict=True))


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def check_a_bad_id_makes_its_row_nan_and_reaches_no_table(function):
    args = example(some(2, 3), 8, dropout=0.0).args
    args |= {"position_ids": torch.arange(3).expand(2, 3).contiguous()}
    dy = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    without = dy.clone()
    without[1, 1] = 0
    for name, table in (("ids", "word"), ("type_ids", "type"), ("position_ids", "position")):
        _, wanted = backward(function, args, without)
        for bad in (-1, len(args[table]), 2**31 + 5, 2**32 + 1):
            for dtype in (torch.int32, torch.int64):
                if bad > torch.iinfo(dtype).max:
                    continue
                ids = args[name].to(dtype, copy=True)
                ids[1, 1] = bad
                y, gradients = backward(function, args, dy, **{name: ids})
                assert y.isnan().all(2).tolist() == [[False] * 3, [False, True, False]]
                assert y.isnan().any(2).sum() == 1
                assert_same(gradients[table], wanted[table])


def check_ids_of_either_dtype_are_the_same(function):
    args = example(some(2, 3), 8, position_ids=some(2, 3, of=5)).args
    wanted = backward(function, args, torch.ones(2, 3, 8))
    for name in ("ids", "type_ids", "position_ids"):
        assert_same(backward(function, args, torch.ones(2, 3, 8), **{name: args[name].int()}), wanted)


def misaligned(x):
    """Return x one element beyond where its memory begins."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def check_tables_need_not_be_aligned(function):
    for dtype in (torch.float32, HALF):
        args = example(some(2, 3), 8, dtype=dtype).args
        dy = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
        wanted = backward(function, args, dy)
        for name in TABLES:
            assert_same(backward(function, args, dy, **{name: misaligned(args[name])}), wanted)
        assert_same(backward(function, args, misaligned(dy)), wanted)


def check_y_may_have_another_dtype(function):
    args = example(some(2, 3), 300).args
    for dtype in (torch.bfloat16, torch.float16):
        dy = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(2)).to(dtype)
        y, gradients = backward(function, args, dy.float())
        with torch.autocast("cpu", dtype=dtype):
            assert_same(backward(function, args, dy), (y.to(dtype), gradients))


def check_a_gradient_from_elsewhere_is_added_and_left_as_it_is(function):
    args = example(some(2, 3), 8).args
    dy = torch.ones(2, 3, 8)
    _, gradients = backward(function, args, dy)
    word = args["word"].requires_grad_()
    for more in (torch.randn(40, 8), torch.randn(8, 40).t(), misaligned(torch.randn(40, 8))):
        before = more.clone()
        result = function(**args, return_word=True)
        (got,) = torch.autograd.grad(result, word, (dy, more))
        torch.testing.assert_close(got, more + gradients["word"])
        assert torch.equal(more, before)


def check_the_row_of_one_number_is_the_bias(function):
    for E in (36, 115, 768, 1000):
        args = example(some(2, 3), E, dropout=0.0).args
        for constant in (0.3, 9.9, 1234.567):
            args |= {"word": torch.full((40, E), constant), "position": torch.zeros(5, E)}
            y = function(**args | {"type": torch.zeros(3, E)})
            assert torch.equal(y, args["norm_bias"].expand_as(y))


CHECKS = [
    check_the_row_of_one_number_is_the_bias,
    check_a_bad_id_makes_its_row_nan_and_reaches_no_table,
    check_ids_of_either_dtype_are_the_same,
    check_tables_need_not_be_aligned,
    check_y_may_have_another_dtype,
    check_a_gradient_from_elsewhere_is_added_and_left_as_it_is,
]

FAULTS = {
    "a warp reads sums that others have not left": (
        "  __syncthreads();  // each warp has left its sums\n",
        "",
    ),
    "rows are added up before each has its totals": ("  __syncthreads();  // each row has its totals\n", ""),
    "totals overwritten before they are read": (
        "  __syncthreads();  // they have been read, and make room for those of dx\n",
        "",
    ),
    "a part added before its warp has left it": (
        "    __syncthreads();  // each warp has left its part\n",
        "",
    ),
    "parts overwritten before they are read": (
        "    __syncthreads();  // they have been read, and make room for the next row's\n",
        "",
    ),
    "the variance of columns that are not there": ("columns.has(k) ? x[k] - center : 0", "x[k] - center"),
    "a mean that keeps what its sum rounds": ("sum[0] + more[0] : NAN", "sum[0] : NAN"),
    "a mean refined by columns that are not there": (
        "columns.has(k) ? (x[k] - sum[0]) * share : 0",
        "(x[k] - sum[0]) * share",
    ),
    "the mean over all columns that lanes have": (
        "share = 1.0f / E",
        "share = 1.0f / TokenColumns<kItems>::kSpan",
    ),
    "the bias dropped": ("x[k] * r * w[k] + b[k]", "x[k] * r * w[k]"),
    "two words of a call exchanged": (
        "bits[0] = words.w0, bits[1] = words.w1",
        "bits[0] = words.w1, bits[1] = words.w0",
    ),
    "the same bits for two columns": ("k % 2 == 0 ? bits", "true ? bits"),
    "the gradient's slope forgotten": (" - h[k] * slope", ""),
    "a group's last token left out": ("used = i < n &&", "used = i + 1 < n &&"),
    "rows of a block left out": (
        "i < rows; ++i) {\n      const auto& those",
        "i < 1; ++i) {\n      const auto& those",
    ),
    "a piece one token short": ("p < first + kPiece; ++p", "p < first + kPiece - 1; ++p"),
    "the pieces of a crowded row counted twice": ("if ((crowded >> warp) % 2 == 0) add_pieces", "add_pieces"),
    "the tokens after the last piece dropped": ("  add_tokens(places.tail, places.end, sum);\n", ""),
    "the gradient from elsewhere forgotten": ("if (base && v < sums.rows) add", "if (false) add"),
    "a bad id takes row 0": ("inside(id, rows) ? id : rows", "inside(id, rows) ? id : 0"),
    "an id cut to 32 bits": (
        "? static_cast<const int64_t*>(ids.data)[t]",
        "? static_cast<int>(static_cast<const int64_t*>(ids.data)[t])",
    ),
    "pairs where they are not aligned": (
        "Any::template fit<T>(E, tables.word, tables.position, tables.type)",
        "true",
    ),
}
