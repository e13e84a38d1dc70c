"""Electric: the discriminator as an energy-based model, trained by noise-contrastive estimation.

    p(x_t | x without x_t) = exp(-E(x)_t) / Z       the model; Z is not computed, and is near 1 after training
    x_t ~ q( . | x without x_t)                     noise at each position with probability k / n
    P(noise) = k q / (k q + (n - k) p) = sigmoid(E(x)_t + log q(x_t) + log(k / (n - k)))

(Clark et al. 2020b, section 2; Ma and Collins 2018.) The loss is the binary cross entropy of P(noise) over
the positions where q is known. A sample is noise even if it equals the original token.

The published code puts noise at exactly k positions. Here a coin decides for each position alone, because a
discriminator can count: if it sees fewer than k noise tokens elsewhere, this token must be noise. A text
without noise would then get higher energies than a text of which every token seems to be noise.

A masked language model knows q at the masked positions only. So only these count, with k / n = 1/2. For the
other tokens of the text, which the other generators use as data, log q would be missing.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from electra_fast.config import ElectraConfig
from electra_fast.generators import Proposal
from electra_fast.ops import Ops
from electra_fast.philox import coins
from electra_fast.results import MaskedTokens, NCELoss


class Noised(NamedTuple):
    """A text in which some tokens are noise, with N of its tokens, from which the loss is computed."""

    ids: Tensor  # shape of ids
    noise: Tensor  # bool [N]
    log_q: Tensor  # float32 [N], of the token that is in the text now
    weights: Tensor  # float32 [N], 0 for a token that does not count
    positions: Tensor | None  # [N], of the tokens in the flattened text; None: N = T


def add_noise(
    ops: Ops,
    generator: nn.Module,
    ids: Tensor,
    masked: MaskedTokens,
    proposal: Proposal,
    rng: Tensor,
) -> Noised:
    """Put samples into a text: at some of all positions if q is known everywhere, else of the masked ones."""
    samples, weights = proposal.samples, proposal.weights
    noise = coins(rng, len(samples), noise_share(generator.config))
    if generator.everywhere:
        tokens = torch.where(noise & (weights > 0), samples, ids.flatten())
        return Noised(tokens.view_as(ids), noise, generator.log_q(proposal, tokens), weights, None)
    text = ops.replace_tokens(ids, masked.positions, samples, weights * noise).ids
    log_q = generator.log_q(proposal, torch.where(noise, samples, masked.targets))
    return Noised(text, noise, log_q, weights, masked.positions)


def noise_loss(ops: Ops, energies: Tensor, noised: Noised, config: ElectraConfig) -> NCELoss:
    """Return the loss of the discriminator's output for the text, energies of the shape of ids."""
    energies = energies.flatten()
    if noised.positions is not None:
        energies = energies.index_select(0, noised.positions)
    of_noise = (noised.log_q, noised.noise, noised.weights)
    return ops.nce_loss(energies, *of_noise, log_odds=log_odds(config))


def noise_share(config: ElectraConfig) -> float:
    """Return k / n: `mask_prob` of all tokens that are not special, or half of the masked slots."""
    return 0.5 if config.generator_kind == "masked" else config.mask_prob


def log_odds(config: ElectraConfig) -> float:
    """Return log(k / (n - k))."""
    share = noise_share(config)
    return math.log(share / (1 - share))
