"""The properties of a masker's distribution, each judged alone.

The random ones are conditional on the number of masked positions in each row. So a masker that masks another
number has only that property wrong.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from electra_fast.reference import MaskedTokens, rate
from electra_fast.testing.budget import Judgement
from electra_fast.testing.distributions.statistics import NotJudged, judged, plausible, seeded, tail, z_test

PAD, CLS, MASK = 0, 101, 103
MASK_PROB, KEEP_PROB = 0.15, 0.15
SHORT = (16, 24)  # lengths at which other roundings, or counting the candidates only, give another count


class _Draw:
    """One call of a masker, with its results on the CPU."""

    def __init__(self, function: Callable, ids: Tensor, candidates: Tensor, step: int, **options):
        (self.B, self.L), given = ids.shape, ids.clone()
        rng = torch.tensor([5, step], device=ids.device)
        with seeded(rng):
            out = function(
                ids=given, candidates=candidates, rng=rng,
                mask_id=MASK, mask_prob=MASK_PROB, keep_prob=KEEP_PROB, **options,
            )  # fmt: skip
        self.overwritten = not torch.equal(given, ids)
        self.ids, self.candidates = ids.cpu(), candidates.cpu()
        self.out = MaskedTokens(*(x.cpu() for x in out))
        self.used = self.out.weights.bool()
        self.positions = self.out.positions.long()
        at = self.positions[self.used]
        self.legal = (at >= 0) & (at < ids.numel())
        self.times = at[self.legal].bincount(minlength=ids.numel()).view(ids.shape)
        self.taken = self.times > 0
        self.changed = self.out.ids != self.ids

    def count(self, n: int) -> str:
        """Return what is wrong with the number of masked positions in rows of n tokens."""
        wanted = self.candidates.sum(1).clamp(max=max(1, (n * rate(MASK_PROB) + 2**31) >> 32))
        wrong = (self.times.sum(1) != wanted).nonzero().flatten().tolist()
        if not wrong:
            return ""
        got, due = self.times.sum(1)[wrong[0]], wanted[wrong[0]]
        return f"{got} in row {wrong[0]} of {n} tokens, the definition has {due} ({len(wrong)} rows differ)"

    def order(self) -> str:
        if len(self.used) % self.B:
            return f"{len(self.used)} slots are not the same number for each of {self.B} rows"
        row = torch.arange(self.B).repeat_interleave(len(self.used) // self.B)[self.used]
        at = self.positions[self.used]
        if not torch.equal(row, at // self.L):
            return "a slot of one row has a position of another"
        return "" if (at.diff()[row.diff() == 0] >= 0).all() else "the positions of a row do not rise"

    def once(self) -> str:
        if not self.legal.all():
            return "a position is not in the batch"
        return "a position occurs twice" if (self.times > 1).any() else ""

    def only_candidates(self) -> str:
        return "a masked position is not a candidate" if (self.taken & ~self.candidates).any() else ""

    def targets(self) -> str:
        at = self.positions[self.used][self.legal]
        right = torch.equal(self.out.targets[self.used][self.legal], self.ids.flatten()[at])
        return "" if right else "a target is not the original id"

    def only_masked(self) -> str:
        return "an unmasked token changed" if (self.changed & ~self.taken).any() else ""

    def only_mask(self) -> str:
        others = int((self.out.ids[self.changed] != MASK).sum())
        share = f"{others} of {int(self.changed.sum())} changed tokens are not [MASK]"
        return share if others else ""

    def input(self) -> str:
        return "the argument ids was overwritten" if self.overwritten else ""


def _batch(B: int, L: int, device: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1000, 2000, (B, L), generator=torch.Generator().manual_seed(0)).to(device)
    ids[:, 0] = CLS
    return ids, ids != CLS


def masker_properties(
    function: Callable,
    *,
    device: str = "cpu",
    B: int = 64,
    L: int = 64,
    steps: int = 40,
    padding: bool = True,
) -> Iterator[Judgement]:
    """Judge a masker with the arguments of `ops.mask_tokens` by name, and with its default probabilities.

    `padding`: whether it accepts `key_mask`.
    """
    batch = _batch(B, L, device)
    draws = [_Draw(function, *batch, step) for step in range(steps)]

    def each(property: Callable[[_Draw], str]) -> Callable[[], str]:
        return lambda: next(filter(None, map(property, draws)), "")

    def count():
        short = (_Draw(function, *_batch(B, length, device), 0) for length in SHORT)
        return next(filter(None, (draw.count(draw.L) for draw in (*draws, *short))), "")

    def few():  # fewer than the number of positions to mask; the other tokens are special
        candidates = torch.zeros_like(batch[1])
        candidates[:, 5:8] = True
        return _Draw(function, batch[0].where(candidates, CLS), candidates, 0).only_candidates()

    @functools.cache
    def padded():
        key_mask = (torch.arange(L, device=device) < L // 2).expand(B, L).contiguous()
        return _Draw(function, batch[0].where(key_mask, PAD), batch[1], 0, key_mask=key_mask)

    yield from judged(
        "masker",
        {
            "masked positions per row": count,
            "order of the slots": each(_Draw.order),
            "each position once": each(_Draw.once),
            "only candidates are masked": each(_Draw.only_candidates),
            "only candidates, if there are few": few,
            "targets": each(_Draw.targets),
            "only masked tokens change": each(_Draw.only_masked),
            "changed tokens are [MASK]": each(_Draw.only_mask),
            "the input is not overwritten": each(_Draw.input),
        },
    )
    if padding:
        yield from judged(
            "masker",
            {
                "masked positions per row with padding": lambda: padded().count(L // 2),
                "padding is not masked": lambda: "it is" if padded().taken[:, L // 2 :].any() else "",
            },
        )
    taken = torch.stack([draw.taken for draw in draws])
    kept = taken & ~torch.stack([draw.changed for draw in draws])
    yield from judged("masker", _random(taken[..., 1:].double(), kept[..., 1:].double()))


def _random(taken: Tensor, kept: Tensor) -> dict[str, Callable]:
    """Return the random properties.

    taken and kept ``[steps, B, K]`` are 1 where a candidate is masked, and where it is and keeps its id.
    """
    # Steps or rows with one mask are judged once. So they do not make other properties wrong.
    same_steps, same_rows = (bool((taken == taken.narrow(axis, 0, 1)).all()) for axis in (0, 1))
    taken, kept = (x[:1] if same_steps else x for x in (taken, kept))
    rows, columns = ((taken.sum(axes), kept.sum(axes)) for axes in (-1, (0, 1)))
    taken = taken[:, :1] if same_rows else taken
    steps, B, K = taken.shape
    k = taken.sum(-1)

    def share():
        n, seen = (x.sum().item() for x in rows)
        return z_test(seen, KEEP_PROB * n, n * KEEP_PROB * (1 - KEEP_PROB))

    def kept_in(masked, seen):
        """Judge the kept ids per row or column, about their own mean: a wrong share is not found twice."""
        some = masked > 0
        q = (seen.sum() / masked.sum()).item()
        if not 0 < q < 1:
            raise NotJudged("no masked token kept its id, or every one did")
        off = (seen - q * masked)[some] ** 2 / (q * (1 - q) * masked[some])
        return plausible(tail(off.sum(), len(off) - 1))

    def uniform():
        # A row with k of K candidates has variance k/K (1 - k/K) in each column, and its columns sum to k.
        variance = (k / K * (1 - k / K)).sum() * K / (K - 1)
        if not variance > 0:
            raise NotJudged("too little was drawn")
        off = taken.sum((0, 1)) - taken.sum() / K
        return plausible(tail((off**2).sum() / variance, K - 1))

    def neighbours():
        # k minus the number of runs, whose mean and variance are those of k ones among K (Wald, Wolfowitz).
        variance = k * (k - 1) * (K - k + 1) * (K - k) / (K * K * (K - 1))
        both = (taken[..., 1:] * taken[..., :-1]).sum()
        return z_test(both.item(), (k * (k - 1) / K).sum().item(), variance.sum().item())

    def together(axis):  # the same column in two rows: hypergeometric
        n = taken.shape[axis] - 1
        a, b = taken.narrow(axis, 0, n), taken.narrow(axis, 1, n)
        ka, kb = a.sum(-1), b.sum(-1)
        variance = ka * kb * (K - ka) * (K - kb) / (K * K * (K - 1))
        return z_test((a * b).sum().item(), (ka * kb / K).sum().item(), variance.sum().item())

    def between_steps():
        alike = steps - len(taken.flatten(1).unique(dim=0))
        return "two steps drew the same masks" if same_steps or alike else together(0)

    def between_rows():
        alike = steps * B - len(taken.flatten(0, 1).unique(dim=0))
        return "rows repeat each other" if same_rows or alike >= 0.01 * steps * B else together(1)

    return {
        "share that keeps its id": share,
        "kept ids of the rows": functools.partial(kept_in, *rows),
        "kept ids of the positions": functools.partial(kept_in, *columns),
        "uniform positions": uniform,
        "independence of neighbours": neighbours,
        "independence of steps": between_steps,
        "independence of rows": between_rows,
    }
