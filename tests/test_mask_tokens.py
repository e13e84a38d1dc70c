import pytest
import torch

from electra_fast import ops, reference, testing

OP = "mask_tokens"
RNG = torch.tensor([1, 0])


def masked(ids, candidates=None, function=ops.mask_tokens, **options):
    candidates = torch.ones_like(ids, dtype=torch.bool) if candidates is None else candidates
    rng = options.pop("rng", RNG).to(ids.device)
    return function(ids, candidates.to(ids.device), rng, mask_id=103, **options)


def test_is_distributed_as_documented(implementation, device):
    slow = implementation[1] == "triton" and device == "cpu"
    size = {"B": 8, "L": 32, "steps": 60} if slow else {}
    testing.check_masker(testing.implementations(OP)[implementation[1]], device=device, **size)


@pytest.mark.parametrize(
    "fault",
    [
        lambda out: out._replace(positions=out.positions.roll(1)),
        lambda out: out._replace(weights=out.weights.index_fill(0, torch.tensor([0]), 0)),
        lambda out: out._replace(ids=torch.where(out.ids == 103, 104, out.ids)),
    ],
    ids=["positions rolled", "a slot is lost", "another token"],
)
def test_the_check_finds_a_broken_masker(fault):
    with pytest.raises(AssertionError):
        testing.check_masker(lambda *args, **kwargs: fault(ops.mask_tokens(*args, **kwargs)))


def test_the_check_finds_a_masker_that_prefers_the_front_and_one_that_repeats_itself():
    def front(ids, candidates, rng, **options):
        first = candidates & (torch.arange(ids.shape[1]) < ids.shape[1] - 3)
        return ops.mask_tokens(ids, first, rng, **options)

    def repeating(ids, candidates, rng, **options):
        return ops.mask_tokens(ids, candidates, rng * torch.tensor([1, 0]), **options)

    for broken in (front, repeating):
        with pytest.raises(AssertionError):
            testing.check_masker(broken)


def test_count_is_right_for_every_length_up_to_8192():
    """The count is round(0.15 n) in exact arithmetic; float32 rounds wrongly for n = 190, 350, 390, …"""
    n = torch.arange(1, 8193)
    P = reference.rate(0.15)
    k = ((n * P + 2**31) >> 32).clamp(min=1)
    exact = torch.tensor([max(1, (15 * int(i) * 2 + 100) // 200) for i in n])  # round half up of 15 n / 100
    assert torch.equal(k, exact)
    assert (k != (n.float() * torch.tensor(0.15)).round().long().clamp(min=1)).any()


@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 127, 128, 190, 350, 390, 511, 1000, 4095, 8192])
def test_count_of_each_implementation(implementation, device, n):
    out = masked(
        torch.full((1, n), 7, device=device), function=testing.implementations(OP)[implementation[1]]
    )
    assert int(out.weights.sum()) == max(1, (30 * n + 100) // 200)


@pytest.mark.skipif("triton" not in testing.implementations(OP), reason="Triton is not installed")
def test_a_tie_goes_to_the_lower_position(device):
    """Random words are hardly ever equal, so the search gets keys that are, among them the largest word."""
    from tie_kernel import take_smallest

    key = torch.tensor([2, 2, 0, 2**32 - 1, 2, 0, 2**32 - 1, 1] * 2, device=device)
    candidate = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1] * 2, dtype=torch.uint8, device=device)
    order = (key + 2**40 * (1 - candidate.long())).argsort(stable=True)
    for k in range(15):
        taken = torch.zeros(16, dtype=torch.uint8, device=device)
        take_smallest[(1,)](key, candidate, taken, k, N=16)
        assert taken.nonzero()[:, 0].tolist() == order[:k].sort().values.tolist()


def test_packed_batch_masks_the_same_count_as_its_sequences(kernel, device):
    lengths = [5, 0, 128, 1, 61]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=device)
    out = masked(
        torch.arange(sum(lengths), device=device) + 200, cu_seqlens=cu, max_seqlen=128, function=kernel
    )
    used = out.positions[out.weights.bool()]
    counts = torch.bucketize(used, cu[1:], right=True).bincount(minlength=5).tolist()
    assert counts == [max(1, round(0.15 * n)) if n else 0 for n in lengths]
    assert torch.equal(used, used.sort().values) and torch.equal(used + 200, out.targets[out.weights.bool()])


def test_padding_and_rows_without_candidates_are_left_unchanged(kernel, device):
    ids = torch.full((3, 16), 7, device=device)
    key_mask = torch.tensor([[True] * 16, [True] * 8 + [False] * 8, [False] * 16], device=device)
    candidates = torch.ones_like(key_mask)
    candidates[0] = False
    out = masked(ids, candidates, key_mask=key_mask, mask_prob=1.0, keep_prob=0.0, function=kernel)
    assert (out.ids[0] == 7).all() and (out.ids[2] == 7).all() and (out.ids[1, 8:] == 7).all()
    assert (out.ids[1, :8] == 103).all() and out.weights.sum() == 8
    assert (out.positions[out.weights == 0] == 0).all() and (out.targets[out.weights == 0] == 0).all()


def test_masks_depend_only_on_the_row_number_and_on_rng(kernel, device):
    ids = torch.full((8, 64), 7, device=device)
    whole, first = masked(ids, function=kernel), masked(ids[:4], function=kernel)
    assert torch.equal(whole.ids[:4], first.ids)
    assert torch.equal(masked(ids, rng=torch.tensor([1, 0]), function=kernel).ids, whole.ids)
    for rng in ([1, 1], [2, 0], [1, 2**32 - 1], [-1, 0], [2**63 - 1, 0]):
        assert not torch.equal(masked(ids, rng=torch.tensor(rng), function=kernel).ids, whole.ids)


def test_bool_bytes_other_than_one_are_true(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    ids = torch.full((2, 40), 7, device=device)
    odd = torch.full((2, 40), 2, dtype=torch.uint8, device=device).view(torch.bool)
    assert torch.equal(masked(ids, odd, function, key_mask=odd).ids, masked(ids, function=function).ids)


IDS = torch.full((2, 8), 7)
YES = torch.ones(2, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": IDS.float()}, TypeError, "mask_tokens: ids must be int64 or int32, got float32"),
        ({"ids": [1, 2]}, TypeError, "mask_tokens: ids must be a tensor, got list"),
        ({"ids": IDS[0]}, ValueError, "mask_tokens: candidates must have shape [8], got [2, 8]"),
        ({"candidates": IDS}, TypeError, "mask_tokens: candidates must be bool, got int64"),
        ({"rng": torch.tensor([1, 2, 3])}, ValueError, "mask_tokens: rng must have shape [2], got [3]"),
        ({"rng": torch.tensor([1.0, 2.0])}, TypeError, "mask_tokens: rng must be int64, got float32"),
        ({"mask_prob": 0}, ValueError, "mask_tokens: mask_prob must be in (0, 1], got 0"),
        ({"mask_prob": 1.5}, ValueError, "mask_tokens: mask_prob must be in (0, 1], got 1.5"),
        ({"mask_prob": float("nan")}, ValueError, "mask_tokens: mask_prob must be in (0, 1], got nan"),
        ({"keep_prob": -0.1}, ValueError, "mask_tokens: keep_prob must be in [0, 1], got -0.1"),
        ({"key_mask": YES[:1]}, ValueError, "mask_tokens: key_mask must have shape [2, 8], got [1, 8]"),
        ({"key_mask": YES.int()}, TypeError, "mask_tokens: key_mask must be bool, got int32"),
        (
            {"cu_seqlens": torch.tensor([0, 16])},
            ValueError,
            "a packed batch must have one token axis, got shape [2, 8]",
        ),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error) as caught:
        ops.mask_tokens(**{"ids": IDS, "candidates": YES, "rng": RNG, "mask_id": 103, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize("bounds", [[1, 16], [0, 15], [0, 9, 8, 16]], ids=["start", "end", "falling"])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_refuses_wrong_bounds_on_the_cpu(bounds, name):
    function = testing.implementations(OP).get(name, ops.mask_tokens)
    with pytest.raises(ValueError, match="mask_tokens: cu_seqlens must"):
        masked(IDS.flatten(), function=function, cu_seqlens=torch.tensor(bounds), max_seqlen=16)


@pytest.mark.parametrize("max_seqlen", [8, 0, -5])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_refuses_a_max_seqlen_that_is_too_small_on_the_cpu(max_seqlen, name):
    function = testing.implementations(OP).get(name, ops.mask_tokens)
    with pytest.raises(ValueError, match=f"mask_tokens: max_seqlen must be at least 9, got {max_seqlen}"):
        masked(IDS.flatten(), function=function, cu_seqlens=torch.tensor([0, 7, 16]), max_seqlen=max_seqlen)


@pytest.mark.skipif("triton" not in testing.implementations(OP), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("bounds", "max_seqlen"),
    [
        ([-40, 40], 64),
        ([0, 64], 64),
        ([0, 30, 9, 40], 64),
        ([0, 40], 16),
        ([2**31 - 1, 40], 64),
        ([0, 9], 64),
    ],
    ids=["below", "above", "falling", "longer than max_seqlen", "far above", "half the batch"],
)
def test_wrong_bounds_make_the_loss_nan_on_a_gpu_and_keep_every_index_legal(bounds, max_seqlen, device):
    ids = torch.arange(40, device=device) + 7
    cu = torch.tensor(bounds, device=device)
    with testing.guarded_memory():
        out = masked(
            ids, function=testing.implementations(OP)["triton"], cu_seqlens=cu, max_seqlen=max_seqlen
        )
    assert out.weights.isnan().any()
    assert ((out.ids == ids) | (out.ids == 103)).all()
    assert ((out.positions >= 0) & (out.positions < 40)).all()


def test_max_seqlen_may_be_any_upper_bound(implementation, device):
    args = {
        "ids": torch.arange(12, device=device),
        "candidates": torch.ones(12, dtype=torch.bool, device=device),
    }
    args |= {"rng": torch.tensor([1, 0], device=device), "mask_id": 99}
    args |= {"cu_seqlens": torch.tensor([0, 9, 12], device=device)}
    function = testing.implementations(OP)[implementation[1]]
    for got, wanted in zip(function(**args, max_seqlen=2**40), function(**args, max_seqlen=9), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("dtype", "mask_id"), [(torch.int32, 2**31 + 5), (torch.int32, -(2**31) - 1), (torch.int64, 2**63)]
)
def test_refuses_a_mask_id_outside_the_dtype_of_ids(dtype, mask_id):
    ids = torch.zeros(2, 3, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"mask_tokens: mask_id must be .* dtype, {name}, got {mask_id}"):
        ops.mask_tokens(ids, ids == 0, torch.tensor([1, 0]), mask_id=mask_id)


@pytest.mark.parametrize("mask_id", [3.0, True, None])
def test_refuses_a_mask_id_that_is_not_an_int(mask_id):
    with pytest.raises(TypeError, match=f"mask_tokens: mask_id must be an int, got {mask_id}"):
        ops.mask_tokens(IDS, YES, RNG, mask_id=mask_id)


def test_refuses_a_packed_batch_without_max_seqlen_or_with_padding():
    packed = {"cu_seqlens": torch.tensor([0, 16])}
    with pytest.raises(TypeError, match="max_seqlen must be an int in a packed batch, got NoneType"):
        masked(IDS.flatten(), **packed)
    with pytest.raises(ValueError, match="key_mask must be None in a packed batch"):
        masked(IDS.flatten(), key_mask=YES.flatten(), max_seqlen=16, **packed)
