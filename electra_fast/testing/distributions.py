"""Statistical checks of the random ops: of a masker, a sampler or dropout.

The seeds are fixed, so each check always gives the same answer. So are the thresholds: the p-value of a
chi-square test must be above 1e-4 divided by the number of tests, and below 1 - 1e-6, because a fit that is
too good is also an error; z must be within 4.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from electra_fast.testing.judge import sample_bounds

TESTS = 32  # number of chi-square tests in this file and its callers; none should fail by chance


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Return the p-value of Pearson's test; cells with an expectation below 5 are merged."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    order = expected.argsort(descending=True)
    counts, expected = counts[order], expected[order]
    large = int((expected >= 5).sum())
    if large < len(expected):
        rest = [(x[:large], x[large:].sum()[None]) for x in (counts, expected)]
        counts, expected = (torch.cat(pair) for pair in rest)
        if expected[-1] < 5 and large:
            counts, expected = (torch.cat([x[:-2], x[-2:].sum()[None]]) for x in (counts, expected))
    assert len(expected) > 1, "chi_square: too few draws for two cells with an expectation of 5"
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


def assert_plausible(what: str, p: float) -> None:
    assert p > 1e-4 / TESTS, f"{what}: p = {p:.2g}, not the specified distribution"
    assert p < 1 - 1e-6, f"{what}: p = {p}, too good to be random"


def assert_z(what: str, observed: float, mean: float, variance: float) -> None:
    z = (observed - mean) / variance**0.5
    assert abs(z) < 4, f"{what}: observed {observed:.6g}, expected {mean:.6g}, z = {z:.2f}"


def check_masker(
    mask_tokens: Callable, *, device: str = "cpu", B: int = 64, L: int = 64, steps: int = 40
) -> None:
    """Check a masker with the signature of `ops.mask_tokens`.

    Counts must be exact, positions uniform over the candidates and independent of neighbours and of the
    previous step, the share that keeps its id must be `keep_prob`, and only candidates may change.
    """
    MASK, keep_prob = 103, 0.15
    ids = torch.randint(1000, 2000, (B, L), generator=torch.Generator().manual_seed(0)).to(device)
    ids[:, 0] = 101
    candidates = (ids != 101).to(device)
    taken, kept, masked = [], 0, 0
    for step in range(steps):
        rng = torch.tensor([5, step], device=device)
        out = mask_tokens(ids, candidates, rng, mask_id=MASK, mask_prob=0.15, keep_prob=keep_prob)
        used = out.weights.bool()
        assert torch.equal(used.view(B, -1).sum(1).cpu(), torch.full((B,), round(0.15 * L))), (
            "masker: wrong number of masked positions in a row"
        )
        chosen = torch.zeros(B * L, dtype=torch.bool, device=device)
        chosen[out.positions[used].long()] = True
        assert int(chosen.sum()) == int(used.sum()), "masker: a position occurs twice"
        assert not (chosen.view(B, L) & ~candidates).any(), "masker: a position is not a candidate"
        assert torch.equal(out.targets[used], ids.flatten()[out.positions[used].long()]), (
            "masker: wrong target"
        )
        changed = out.ids != ids
        assert not (changed.flatten() & ~chosen).any(), "masker: an unmasked token changed"
        assert (out.ids[changed] == MASK).all(), "masker: a changed token is not [MASK]"
        masked, kept = masked + int(used.sum()), kept + int(used.sum()) - int(changed.sum())
        taken.append(chosen.view(B, L)[:, 1:].cpu())
    taken = torch.stack(taken).double()  # [steps, B, L - 1]
    assert_z(
        "masker: share that keeps its id", kept, keep_prob * masked, masked * keep_prob * (1 - keep_prob)
    )
    assert len(taken.flatten(1).unique(dim=0)) == steps, "masker: two steps drew the same masks"
    assert len(taken.flatten(0, 1).unique(dim=0)) > 0.99 * steps * B, "masker: rows repeat each other"

    # Without replacement the count of a column has variance n q (1 - q), and the columns sum to a constant.
    # The factor (L - 2) / (L - 1) makes Pearson's statistic over the L - 1 candidates a chi-square.
    q, n = taken.mean(), steps * B
    statistic = ((taken.sum((0, 1)) - n * q) ** 2 / (n * q * (1 - q))).sum() * (L - 2) / (L - 1)
    p = torch.special.gammaincc(torch.tensor((L - 2) / 2).double(), statistic / 2).item()
    assert_plausible("masker: positions in a row", p)
    both = {
        "neighbours": taken[..., 1:] * taken[..., :-1],
        "steps": taken[1:] * taken[:-1],
        "rows": taken[:, 1:] * taken[:, :-1],
    }
    k = round(0.15 * L)
    within = k * (k - 1) / ((L - 1) * (L - 2))  # two positions of one row
    for name, x in both.items():
        mean = within if name == "neighbours" else q.item() ** 2
        assert_z(
            f"masker: masked together, {name}",
            x.sum().item(),
            mean * x.numel(),
            mean * (1 - mean) * x.numel(),
        )


def check_sampler(
    mlm_head: Callable, *, device: str = "cpu", M: int = 4096, steps: int = 8, V: int = 257
) -> None:
    """Compare the samples of a head with the signature of `ops.mlm_head` with the softmax of its logits.

    Flat and peaked rows are tested by chi-square, the tail behind one token at logit gaps 8 and 12 by z. A
    token of probability 0 must not occur. As the uniforms are specified, every sample must be inside the
    float64 bracket of its uniform.
    """
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(V, 16, generator=generator)
    for name, scale, options in (
        ("flat", 0.02, {}),
        ("peaked", 1.0, {}),
        ("hot", 1.0, {"temperature": 2.0}),
        ("never the target", 0.5, {"disallow_correct": True}),
    ):
        x = (scale * torch.randn(1, 16, generator=generator)).expand(M, 16).contiguous()
        bias = torch.zeros(V)
        bias[7] = -1e4  # probability 0
        counts = torch.zeros(V)
        targets = torch.full((M,), 3)
        for step in range(steps):
            rng = torch.tensor([9, step])
            args = [t.to(device) for t in (x, table, bias, targets, torch.ones(M), rng)]
            samples = mlm_head(*args, **options).samples.cpu()
            counts += samples.bincount(minlength=V)
            cdf, u, tol = sample_bounds(x, table, bias, targets, rng, **options)
            below = torch.where(samples > 0, cdf.gather(1, (samples - 1).clamp(min=0)[:, None])[:, 0], 0.0)
            above = cdf.gather(1, samples[:, None])[:, 0]
            assert ((below - tol <= u) & (u < above + tol)).all(), (
                f"sampler, {name}: a sample outside of its bracket"
            )
        p = cdf[0].diff(prepend=cdf.new_zeros(1))
        assert counts[7] == 0, f"sampler, {name}: a token of probability 0 was drawn"
        if "disallow_correct" in options:
            assert counts[3] == 0, f"sampler, {name}: the target was drawn"
        assert_plausible(f"sampler, {name}", chi_square(counts[p > 0], (p * M * steps)[p > 0]))
    M = 4 * M  # for about 200 draws behind the larger gap
    for gap in (8.0, 12.0):
        bias = torch.zeros(V)
        bias[V // 2] = gap
        args = (torch.zeros(M, 16), table, bias, torch.zeros(M, dtype=torch.long), torch.ones(M))
        tail, share = 0, (V - 1) / (V - 1 + torch.tensor(gap).double().exp().item())
        for step in range(steps):
            rng = torch.tensor([11, step])
            tail += int((mlm_head(*(t.to(device) for t in (*args, rng))).samples.cpu() != V // 2).sum())
        assert_z(
            f"sampler: the tail behind a gap of {gap}",
            tail,
            M * steps * share,
            M * steps * share * (1 - share),
        )


def check_dropout(
    dropout: Callable, p: float = 0.1, *, device: str = "cpu", rows: int = 512, columns: int = 96
) -> None:
    """Check `dropout(x, p, rng, stream) -> like x` for x = ones ``[rows, columns]``.

    Kept elements must be scaled by 1/(1-p); the counts in total, per column and per row must be binomial;
    neighbours, steps and streams must be independent.
    """
    x = torch.ones(rows, columns, device=device)
    kept = {}
    for key in ((3, 0, 2), (3, 1, 2), (3, 0, 3), (4, 0, 2)):
        y = dropout(x, p, torch.tensor(key[:2], device=device), key[2]).cpu()
        kept[key] = (y != 0).double()
        assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p), dtype=y.dtype)), (
            "dropout: kept elements have a wrong scale"
        )
    first, *others = kept.values()
    q = 1 - round(p * 65536) / 65536
    n = first.numel()
    assert_z("dropout: kept share", first.sum().item(), n * q, n * q * (1 - q))
    for name, counts, size in (("columns", first.sum(0), rows), ("rows", first.sum(1), columns)):
        statistic = ((counts - size * q) ** 2 / (size * q * (1 - q))).sum()
        tail = torch.special.gammaincc(torch.tensor(len(counts) / 2).double(), statistic / 2).item()
        assert_plausible(f"dropout: {name}", tail)
    pairs = [("another step, stream or seed", first * other) for other in others]
    pairs += [(f"columns {d} apart", first[:, d:] * first[:, :-d]) for d in (1, 2, 8, 16, 32)]
    pairs += [("neighbouring rows", first[1:] * first[:-1])]
    for name, both in pairs:
        m = both.numel()
        # Products of overlapping pairs are correlated; q^2 (1-q^2) + 2 q^3 (1-q) bounds the variance.
        assert_z(
            f"dropout: {name}", both.sum().item(), m * q * q, m * (q * q * (1 - q * q) + 2 * q**3 * (1 - q))
        )
