"""embed in csrc/cuda: examples for each regime of its kernels, further checks, and faults to detect."""

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


def random_ids(*shape, of=40):
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(0))


HALF = torch.bfloat16
CROWDED_IDS = torch.tensor([3, 5, *[3, 5] * 12, *range(14)])[random_ids(17, 100)]
EXAMPLES = [
    # A row in one lane, in part of a warp, in a warp, in a warp with 24 columns per lane, in several warps.
    *(example(random_ids(2, 3), E) for E in (1, 31, 128, 768, 1024)),
    *(example(random_ids(2, 3), E, dtype=HALF) for E in (33, 768, 4096)),
    # Ids 3 and 5 have 14 of 40 tokens each, enough for the whole block to sum their pieces.
    example(CROWDED_IDS, 6, type_ids=None, return_word=True),
    # Groups of tokens that are not positions, with more rows than one block computes at once; 32-bit keys.
    example(random_ids(70, of=2**15), 4, V=2**15, position_ids=random_ids(70, of=72)),
]


def backward(function, args, dy, **more):
    """Return y and the gradients of the tables for dy. Tensors are not made contiguous or aligned."""
    args = {**args, **more}
    leaves = [args[name].detach().requires_grad_() for name in TABLES]
    y = function(**{**args, **dict(zip(TABLES, leaves, strict=True))})
    return y, dict(zip(TABLES, torch.autograd.grad(y, leaves, dy), strict=True))


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def check_a_bad_id_makes_its_row_nan_and_reaches_no_table(function):
    args = example(random_ids(2, 3), 8, dropout=0.0).args
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
    args = example(random_ids(2, 3), 8, position_ids=random_ids(2, 3, of=5)).args
    wanted = backward(function, args, torch.ones(2, 3, 8))
    for name in ("ids", "type_ids", "position_ids"):
        assert_same(backward(function, args, torch.ones(2, 3, 8), **{name: args[name].int()}), wanted)


def misaligned(x):
    """Return a copy of x that starts one element after the start of its memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def check_tables_need_not_be_aligned(function):
    for dtype in (torch.float32, HALF):
        args = example(random_ids(2, 3), 8, dtype=dtype).args
        dy = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
        wanted = backward(function, args, dy)
        for name in TABLES:
            assert_same(backward(function, args, dy, **{name: misaligned(args[name])}), wanted)
        assert_same(backward(function, args, misaligned(dy)), wanted)


def check_y_may_have_another_dtype(function):
    args = example(random_ids(2, 3), 300).args
    for dtype in (torch.bfloat16, torch.float16):
        dy = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(2)).to(dtype)
        y, gradients = backward(function, args, dy.float())
        with torch.autocast("cpu", dtype=dtype):
            assert_same(backward(function, args, dy), (y.to(dtype), gradients))


def check_another_gradient_of_the_word_table_is_added_and_not_changed(function):
    args = example(random_ids(2, 3), 8).args
    dy = torch.ones(2, 3, 8)
    _, gradients = backward(function, args, dy)
    word = args["word"].requires_grad_()
    for more in (torch.randn(40, 8), torch.randn(8, 40).t(), misaligned(torch.randn(40, 8))):
        before = more.clone()
        result = function(**args, return_word=True)
        (got,) = torch.autograd.grad(result, word, (dy, more))
        torch.testing.assert_close(got, more + gradients["word"])
        assert torch.equal(more, before)


def check_a_constant_row_becomes_the_bias(function):
    for E in (36, 115, 768, 1000):
        args = example(random_ids(2, 3), E, dropout=0.0).args
        for constant in (0.3, 9.9, 1234.567):
            args |= {"word": torch.full((40, E), constant), "position": torch.zeros(5, E)}
            y = function(**args | {"type": torch.zeros(3, E)})
            assert torch.equal(y, args["norm_bias"].expand_as(y))


CHECKS = [
    check_a_constant_row_becomes_the_bias,
    check_a_bad_id_makes_its_row_nan_and_reaches_no_table,
    check_ids_of_either_dtype_are_the_same,
    check_tables_need_not_be_aligned,
    check_y_may_have_another_dtype,
    check_another_gradient_of_the_word_table_is_added_and_not_changed,
]

SOURCES = ("embed.cu", "embed_table_gradient.cu", "embed.cuh")  # each fault is in one of them
FAULTS = {
    "a warp reads sums that other warps have not stored": (
        "  __syncthreads();  // every warp has stored its sums\n",
        "",
    ),
    "totals are summed before every row has stored its own": (
        "  __syncthreads();  // all rows have stored their totals\n",
        "",
    ),
    "totals are replaced before they are read": (
        "  __syncthreads();  // the totals have been read, and those of dx may replace them\n",
        "",
    ),
    "a part is added before its warp has stored it": (
        "    __syncthreads();  // every warp has stored its part\n",
        "",
    ),
    "parts are replaced before they are read": (
        "    __syncthreads();  // the parts have been read, and those of the next row may replace them\n",
        "",
    ),
    "the variance has columns past the end of the row": (
        "columns.has(k) ? x[k] - center : 0",
        "x[k] - center",
    ),
    "the mean has no correction": ("average[0] + correction[0] : NAN", "average[0] : NAN"),
    "the correction of the mean has columns past the end of the row": (
        "columns.has(k) ? (x[k] - average[0]) * inverse_E : 0",
        "(x[k] - average[0]) * inverse_E",
    ),
    "the mean is over all columns of the lanes": (
        "inverse_E = 1.0f / E",
        "inverse_E = 1.0f / TokenColumns<kItems>::kSpan",
    ),
    "no bias": ("x[k] * r * w[k] + b[k]", "x[k] * r * w[k]"),
    "two words of a Philox call are exchanged": (
        "bits[0] = words.w0, bits[1] = words.w1",
        "bits[0] = words.w1, bits[1] = words.w0",
    ),
    "two columns have the same random bits": ("k % 2 == 0 ? bits", "true ? bits"),
    "the gradient has no term of h": (" - h[k] * average_gh", ""),
    "the last token of a group is left out": ("used = i < n &&", "used = i + 1 < n &&"),
    "the sums have only the first row of a block": (
        "i < rows; ++i) {\n      const auto& row",
        "i < 1; ++i) {\n      const auto& row",
    ),
    "a piece has one token too few": ("i < first + kPiece; ++i", "i < first + kPiece - 1; ++i"),
    "the pieces of a crowded row are counted twice": (
        "if ((crowded >> warp) % 2 == 0) add_pieces",
        "add_pieces",
    ),
    "the tokens after the last piece are left out": (
        "  add_tokens(segment.tail, segment.end, sum);\n",
        "",
    ),
    "the other gradient of the word table is not added": (
        "if (base && v < sums.rows) add",
        "if (false) add",
    ),
    "a bad id counts as 0": ("is_row(id, rows) ? id : rows", "is_row(id, rows) ? id : 0"),
    "an id is truncated to 32 bits": (
        "? static_cast<const int64_t*>(ids.data)[t]",
        "? static_cast<int>(static_cast<const int64_t*>(ids.data)[t])",
    ),
    "packs that are not aligned": (
        "Any::template fit<T>(E, tables.word, tables.position, tables.type)",
        "true",
    ),
}
