"""The random words, compared with Random123's published answers and with a version in Python integers."""

import pytest
import torch

from electra_fast import testing
from electra_fast.philox import MASKING, SAMPLING, drop, keep_mask, philox, uniforms

LOW = 0xFFFFFFFF


def philox_of_integers(counter, key, rounds=10):
    c, k = list(counter), list(key)
    for _ in range(rounds):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & LOW, (a >> 32) ^ c[3] ^ k[1], a & LOW]
        k = [(k[0] + 0x9E3779B9) & LOW, (k[1] + 0xBB67AE85) & LOW]
    return c


def signed(low, high):
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((LOW,) * 4, (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, words):
    assert tuple(philox_of_integers(counter, key)) == words
    c0, row, step, stream = counter
    rng = torch.tensor([signed(*key), step])
    got = philox(rng, torch.tensor([c0]), torch.tensor([row]), stream)
    assert tuple(int(w) for w in got) == words


@pytest.mark.parametrize("seed", [0, 1, 16, -1, -(2**63), 2**63 - 1])
def test_extreme_seeds_and_fewer_rounds(seed):
    rng, row = torch.tensor([seed, 2**32 - 1]), torch.tensor([0, 1, 2**31, 2**32 - 1])
    words = torch.stack(philox(rng, torch.tensor(5), row, 9, rounds=7), 1)
    for r, w in zip(row.tolist(), words.tolist(), strict=True):
        assert w == philox_of_integers((5, r, 2**32 - 1, 9), (seed & LOW, seed >> 32 & LOW), 7)


def test_uniforms_have_53_bits_and_pass_kolmogorov_smirnov():
    u = uniforms(torch.tensor([3, 1]), 100_000)
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    assert (u * 2.0**53 == (u * 2.0**53).floor()).all() and (u * 2.0**30 % 1 != 0).any()
    n = len(u)
    distance = (u.sort().values - torch.arange(1, n + 1) / n).abs().max()
    assert distance < 1.63 / n**0.5


def test_dropout_uses_the_documented_bits():
    rng, p = torch.tensor([7, 2]), 0.3
    keep = keep_mask(rng, 4, torch.tensor([11, 12]), 70, p)
    for i, row in enumerate((11, 12)):
        for column in range(70):
            call = (column // 32) * 4 + (column % 8) // 2
            word = philox_of_integers((call, row, 2, 4), (7, 0), 7)[(column // 8) % 4]
            bits = word & 0xFFFF if column % 2 == 0 else word >> 16
            assert keep[i, column] == (bits >= round(p * 65536))


def test_no_two_uses_share_bits():
    """Collect each (counter, word, half) of three small steps: masks, samples and two uses of dropout."""
    drawn = []
    for step in range(3):
        for t in range(24):
            drawn += [(0, t, step, MASKING, word, half) for word in (0, 1) for half in (0, 1)]
        for m in range(6):
            drawn += [(0, m, step, SAMPLING, word, half) for word in (0, 1) for half in (0, 1)]
        for stream in (2, 3):
            for row in range(24):
                for column in range(70):
                    call, word = (column // 32) * 4 + (column % 8) // 2, (column // 8) % 4
                    drawn.append((call, row, step, stream, word, column % 2))
    assert len(drawn) == len(set(drawn)) == 3 * (24 * 4 + 6 * 4 + 2 * 24 * 70)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_distributed_as_documented(p):
    testing.check_dropout(drop, p)


def test_the_dropout_check_finds_a_constant_stream_a_wrong_rate_and_repeated_columns():
    with pytest.raises(AssertionError):
        testing.check_dropout(lambda x, p, rng, stream: drop(x, p, rng, 2))
    with pytest.raises(AssertionError):
        testing.check_dropout(lambda x, p, rng, stream: drop(x, 0.13, rng, stream) * (1 - 0.13) / (1 - p))
    with pytest.raises(AssertionError):
        testing.check_dropout(
            lambda x, p, rng, stream: drop(x[:, ::2], p, rng, stream).repeat_interleave(2, 1)
        )
