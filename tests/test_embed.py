import pytest
import torch

from electra_fast import ops, reference, testing
from electra_fast.philox import keep_mask
from electra_fast.testing.examples import Example

OP = "embed"
RNG = torch.tensor([1, 0])
TABLES = ("word", "position", "type", "norm_weight", "norm_bias")


def arguments(device="cpu", dtype=torch.float32, **change):
    generator = torch.Generator().manual_seed(0)
    word, position, type = (torch.randn(n, 8, generator=generator).to(dtype) for n in (20, 6, 2))
    args = {"ids": torch.tensor([[3, 4, 5], [6, 0, 0]]), "type_ids": None, "position_ids": None}
    args |= {"word": word, "position": position, "type": type}
    args |= {"norm_weight": torch.ones(8), "norm_bias": torch.zeros(8), "eps": 1e-12}
    args = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in args.items()}
    return args | {
        n: x.to(device) if device != "cpu" and isinstance(x, torch.Tensor) else x for n, x in change.items()
    }


def test_types_default_to_zero_and_positions_count_from_zero(kernel, device):
    ids = torch.tensor([[3, 4, 5], [6, 0, 0]])
    given = {"type_ids": torch.zeros_like(ids), "position_ids": torch.arange(3).expand(2, 3)}
    assert torch.equal(kernel(**arguments(device)), kernel(**arguments(device, **given)))


def test_a_packed_batch_starts_each_sequence_at_position_zero(kernel, device):
    packed = {"ids": torch.tensor([3, 4, 5, 6]), "cu_seqlens": torch.tensor([0, 3, 3, 4], dtype=torch.int32)}
    y = kernel(**arguments(device, **packed))
    padded = kernel(**arguments(device))
    assert torch.equal(y, torch.cat([padded[0], padded[1, :1]]))


def test_the_result_has_the_autocast_dtype_and_gradients_that_of_the_tables(device):
    args = arguments(device)
    args["word"].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.embed(**args)
        assert y.dtype == reference.embed(**args).dtype == torch.bfloat16
    y.sum().backward()
    assert args["word"].grad.dtype == torch.float32
    assert ops.embed(**arguments(device, dtype=torch.float16)).dtype == torch.float16


def test_a_frozen_table_gets_no_gradient_and_an_unused_row_gets_zero(kernel, device):
    args = arguments(device)
    args["word"].requires_grad_()
    kernel(**args).square().sum().backward()
    assert args["position"].grad is None and (args["word"].grad[10:] == 0).all()


def batch(T, V, E, dtype=torch.float32, seed=0, **options):
    """An example of T tokens in rows of 16. 30 % of the ids are 3, the others are random."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.where(torch.rand(T, generator=g) < 0.3, 3, torch.randint(V, (T,), generator=g))
    tables = [0.02 * torch.randn(n, E, generator=g).to(dtype) for n in (V, 16, 2)]
    norm = [1 + 0.1 * torch.randn(E, generator=g), 0.1 * torch.randn(E, generator=g)]
    args = {"ids": ids.view(-1, 16), "type_ids": None, "position_ids": None}
    args |= dict(zip(TABLES, tables + norm, strict=True)) | {"eps": 1e-12, **options}
    return Example("embed", f"T={T} V={V} E={E}", args, TABLES)


def test_the_gradient_of_the_returned_word_table_is_added(kernel, device):
    args = arguments(device)
    args["word"].requires_grad_()
    x, word = kernel(**args, return_word=True)
    assert torch.equal(word, args["word"])
    upstream = torch.randn_like(word)
    (own,) = torch.autograd.grad(x.square().sum(), args["word"], retain_graph=True)
    (passed,) = torch.autograd.grad((word * upstream).sum(), args["word"], retain_graph=True)
    (both,) = torch.autograd.grad(x.square().sum() + (word * upstream).sum(), args["word"])
    assert torch.equal(passed, upstream)
    torch.testing.assert_close(both, own + upstream)


def test_a_frozen_word_table_is_returned_unchanged(kernel, device):
    args = arguments(device)
    args["position"].requires_grad_()
    x, word = kernel(**args, return_word=True)
    assert word is args["word"] and x.requires_grad


@pytest.mark.parametrize("name", testing.implementations("embed"))
def test_dropout_drops_what_keep_mask_says(name, device):
    rng, ones = torch.tensor([-5, 9], device=device), torch.ones(100, device=device)
    example = batch(64, 40, 100, norm_weight=0 * ones, norm_bias=ones, dropout=0.3, rng=rng, stream=7)
    y = testing.implementations("embed")[name](**example.to(device=device).args)
    kept = keep_mask(rng, 7, torch.arange(64, device=device).view(4, 16), 100, 0.3)
    assert torch.equal(y != 0, kept)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7))


@pytest.mark.parametrize("name", testing.implementations("embed"))
@pytest.mark.parametrize("E", [1, 36, 100, 115, 768])
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_a_constant_row_is_the_bias(E, eps, name, device):
    """The sum of E constants is rounded, so without a correction the mean differs from the constant."""
    constants = torch.tensor([0.3, -0.0123, 1 / 3, 9.9, 1234.567, -7e4, 1e10, 1e-30], device=device)
    args = batch(16, 8, E).to(device=device).args
    args |= {"ids": torch.arange(8, device=device)[None]}
    args |= {"word": constants[:, None].repeat(1, E), "eps": eps, "dropout": 0.0}
    args |= {table: torch.zeros_like(args[table]) for table in ("position", "type")}
    args["word"].requires_grad_()
    y = testing.implementations("embed")[name](**args)
    y.sum().backward()
    assert torch.equal(y, args["norm_bias"].expand_as(y)) and args["word"].grad.isfinite().all()


@pytest.mark.parametrize("name", testing.implementations("embed"))
@pytest.mark.parametrize(("shape", "E"), [((3, 0), 8), ((0, 3), 8), ((0,), 8), ((2, 3), 0)], ids=str)
def test_any_axis_may_be_empty(shape, E, name, device):
    if E == 0 and name == "cuda":
        pytest.skip("refused: word must have 1 to 4096 columns")
    args = arguments(device, ids=torch.zeros(shape, dtype=torch.long, device=device))
    for table in TABLES:
        args[table] = args[table][..., :E].requires_grad_()
    y = testing.implementations("embed")[name](**args)
    y.sum().backward()
    assert y.shape == (*shape, E)
    assert all((args[table].grad == 0).all() for table in TABLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frequent_id_is_summed_in_float32(dtype, device):
    """6000 tokens have the same id. A sum of them in bfloat16 would stop growing at a few hundred."""
    testing.check_example(ops.embed, batch(20_000, 500, 24, dtype).to(device=device))


@pytest.mark.skipif("triton" not in testing.implementations(OP), reason="Triton is not installed")
def test_programs_of_many_tiles_and_ids_of_many_pieces(device, monkeypatch):
    """As for real sizes, a program of the backward pass has several tiles; the last ones are cut or empty.

    The 100 tokens of one id have whole pieces and blocks, which are summed first.
    """
    from electra_fast.kernels import _embed_sums, embed

    monkeypatch.setattr(embed, "PROGRAMS", 32)
    monkeypatch.setattr(_embed_sums, "PIECE", 4)
    for options in ({}, {"position_ids": torch.arange(16).repeat(21, 1)}):
        example = batch(21 * 16, 50, 128, **options).to(device=device)
        testing.check_example(testing.implementations(OP)["triton"], example)


def test_any_number_of_threads_gives_the_same_bits(check_thread_counts):
    check_thread_counts(ops.embed, batch(3200, 700, 64, dropout=0.1, rng=RNG, stream=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_need_not_be_aligned(dtype, kernel, device):
    """Each table is a slice from the second element on, so no vector load is aligned."""
    example = batch(48, 33, 31, dtype).to(device=device)
    for name in TABLES:
        x = example.args[name]
        example.args[name] = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    testing.check_example(kernel, example)


def test_int32_and_int64_ids_give_the_same(kernel, device):
    example = batch(160, 40, 24).to(device=device)
    results, gradients = testing.run(kernel, example)
    example.args["ids"] = example.args["ids"].int()
    again, gradients_again = testing.run(kernel, example)
    assert torch.equal(results["result"], again["result"])
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in TABLES)


@pytest.mark.parametrize("name", ["ids", "type_ids", "position_ids"])
@pytest.mark.parametrize("bad", [-1, 2**31 + 5, 20])
def test_a_bad_id_raises_on_the_cpu_and_makes_its_row_nan_on_a_gpu(device, name, bad):
    ids = torch.tensor([[0, 1, 1], [1, bad, 0]])
    if device == "cpu":
        with pytest.raises(IndexError, match=rf"embed: {name} must be in \[0, \d+\), got {bad} at \[1, 1\]"):
            ops.embed(**arguments(**{name: ids}))
    else:
        y = ops.embed(**arguments(device, **{name: ids}))
        assert y[1, 1].isnan().all() and y[0].isfinite().all()


TABLE = torch.zeros(20, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(2, 3)}, TypeError, "embed: ids must be int64 or int32, got float32"),
        (
            {"ids": torch.zeros(2, 3, dtype=torch.uint8)},
            TypeError,
            "embed: ids must be int64 or int32, got uint8",
        ),
        (
            {"type_ids": torch.zeros(3, 2, dtype=torch.long)},
            ValueError,
            "embed: type_ids must have shape [2, 3], got [3, 2]",
        ),
        ({"position": TABLE[:, :4]}, ValueError, "embed: position must have shape [*, 8], got [20, 4]"),
        ({"type": TABLE.double()}, TypeError, "embed: type must be float32, got float64"),
        ({"norm_bias": torch.zeros(3)}, ValueError, "embed: norm_bias must have shape [8], got [3]"),
        (
            {"padding_idx": 20},
            ValueError,
            "embed: padding_idx must be a row of word, in [0, 20), got 20",
        ),
        ({"dropout": 0.1}, ValueError, "embed: rng must be given if random numbers are drawn, got None"),
        ({"dropout": 1.0, "rng": RNG}, ValueError, "embed: dropout must be in [0, 1), got 1.0"),
        ({"word": TABLE.to("meta")}, ValueError, "embed: word must be on cpu as the others are, got meta"),
        (
            {"ids": torch.zeros(1, 7, dtype=torch.long)},
            ValueError,
            "ids must have at most 6 positions per sequence, got 7",
        ),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error) as caught:
        ops.embed(**arguments(**change))
    assert message in str(caught.value)


@pytest.mark.parametrize("bounds", [[1, 3], [0, 2], [0, 3, 2, 3]])
def test_refuses_wrong_bounds_on_the_cpu(bounds):
    with pytest.raises(ValueError, match="embed: cu_seqlens must rise from 0 to the 3 tokens"):
        ops.embed(**arguments(ids=torch.tensor([1, 2, 3]), cu_seqlens=torch.tensor(bounds)))
