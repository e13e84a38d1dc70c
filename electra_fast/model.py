"""ELECTRA: a generator fills in masked tokens, and a discriminator finds the tokens that it replaced.

    x_masked = MASK(x)          L_MLM = mean over masked t of  -log p_G(x_t | x_masked)
    x_hat ~ p_G( . | x_masked)  L_RTD = mean over real t of    -log p_D(x_corrupt_t replaced or original)
    x_corrupt = x with x_hat    L = mlm_weight * L_MLM + rtd_weight * L_RTD

(Clark et al. 2020, section 2). No gradient flows through a sample: L_MLM trains the generator, L_RTD the
discriminator, and both train the embedding that they share. With ``objective="electric"`` the discriminator
learns the energies of tokens instead (`electra_fast.electric`); `electra_fast.generators` has the generators.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from electra_fast.config import ElectraConfig
from electra_fast.distributed import of_this_process
from electra_fast.electric import add_noise, noise_loss
from electra_fast.errors import must
from electra_fast.generators import Generator, UniformGenerator, candidates
from electra_fast.modules import (
    FIRST_STREAM,
    UNPADDED,
    DifferenceEmbedding,
    DiscriminatorHead,
    Encoder,
    Layout,
    draw_rng,
)
from electra_fast.ops import FUSED, Ops
from electra_fast.pretrained import PretrainedHalf
from electra_fast.resize import resize
from electra_fast.results import MaskedTokens
from electra_fast.two_tower import TwoTowerGenerator

OBJECTIVE = "pretraining_objective"  # an entry of config.json, which transformers does not read
GENERATORS = {"masked": Generator, "two_tower": TwoTowerGenerator, "uniform": UniformGenerator}


class ElectraOutput(NamedTuple):
    loss: Tensor  # [] float32, mlm_weight * mlm_loss + rtd_weight * rtd_loss
    mlm_loss: Tensor  # [] float32, mean over the masked positions
    rtd_loss: Tensor  # [] float32, mean over the real tokens
    mlm_correct: Tensor  # [] float32, number of masked positions whose most likely token is the original
    masked: Tensor  # [] float32, number of masked positions; mlm_correct / masked is the accuracy
    rtd_counts: Tensor  # [4] float32, true positives, false positives, false negatives, true negatives
    # A two-tower generator predicts all tokens that are not special: `masked` is their number. Electric's NCE
    # loss and its counts, of noise instead of replaced tokens, are `rtd_loss` and `rtd_counts`.

    def numbers(self) -> Tensor:
        """Return the metrics of a micro-batch, float32 ``[9]``, in the order of `StepMetrics`."""
        mlm = (self.mlm_loss * self.masked, self.mlm_correct, self.masked)
        return torch.cat([torch.stack([self.loss, *mlm, self.rtd_loss]), self.rtd_counts])


class Discriminator(PretrainedHalf):
    """The encoder for use after pre-training, with the state dict and logits of ``ElectraForPreTraining``."""

    hugging_face_class: ClassVar[str] = "ElectraForPreTraining"
    head_names: ClassVar[dict[str, str]] = {
        "head.dense.": "discriminator_predictions.dense.",
        "head.score.": "discriminator_predictions.dense_prediction.",
    }

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.config = config
        # The streams of dropout do not depend on whether there is a generator.
        self.stream = FIRST_STREAM + Encoder.streams(config.for_generator())
        self.encoder = Encoder(config, ops)
        self.head = DiscriminatorHead(config, ops)

    def forward(
        self,
        ids: Tensor,
        *,
        type_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rng: Tensor | None = None,
        words: Tensor | None = None,
    ) -> Tensor:
        """Return one logit per token, ``[B, L]`` or ``[T]``, positive if it seems replaced.

        Of Electric it is the energy of the token. Arguments as in `Electra`; `words` is the word table as the
        generator returned it, if it is shared.
        """
        layout = Layout(key_mask, cu_seqlens, max_seqlen)
        x = self.encoder(ids, layout, type_ids=type_ids, rng=rng, stream=self.stream, words=words)
        return self.head(x)

    def described(self) -> dict[str, Any]:
        """Return the config.json of this model, with the objective if it is not ELECTRA's."""
        objective = self.config.objective
        return super().described() | ({} if objective == "electra" else {OBJECTIVE: objective})

    @classmethod
    def build(cls, described: dict[str, Any], config: ElectraConfig, ops: Ops) -> Self:
        return cls(dataclasses.replace(config, objective=described.get(OBJECTIVE, "electra")), ops)


class Electra(nn.Module):
    """Both halves and the pre-training task.

    ``.generator`` and ``.discriminator`` are complete models with Hugging Face's state dicts. With
    ``sharing="embeddings"`` both contain the same `SharedEmbedding`, with ``"all"`` the same `Encoder`;
    ``parameters()`` yields shared parameters once. With ``"gdes"`` the discriminator has a
    `DifferenceEmbedding`. The generator's head always uses the word table of its embedding.
    """

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        self.config = config
        self.ops = ops
        self.generator = GENERATORS[config.generator_kind](config, ops)
        self.discriminator = Discriminator(config, ops)
        if config.generator_kind == "uniform":
            pass  # it has nothing to share
        elif config.sharing == "embeddings":
            self.discriminator.encoder.embedding = self.generator.encoder.embedding
        elif config.sharing == "all":
            self.discriminator.encoder = self.generator.encoder
        elif config.sharing == "gdes":
            difference = DifferenceEmbedding(self.generator.encoder.embedding, config, ops)
            self.discriminator.encoder.embedding = difference
        self.register_load_state_dict_pre_hook(_check_shared_parameters)

    def forward(
        self,
        ids: Tensor,
        *,
        type_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rng: Tensor | None = None,
    ) -> ElectraOutput:
        """Mask, generate, discriminate; return the losses of one micro-batch. The host does not synchronize.

        Args:
            ids: ``[B, L]`` padded or ``[T]`` packed, int32 or int64.
            type_ids: the segment of each token, shape of ids; None: 0 everywhere.
            key_mask: bool ``[B, L]``, True = real; None: every token is.
            cu_seqlens: int32 ``[B + 1]``, from 0 to T: the bounds of the sequences of a packed batch. Ids
                ``config.pad_id`` in it are padding, so a batch may be filled up to a fixed T.
            max_seqlen: the longest sequence of a packed batch, or more.
            rng: int64 ``[2]`` = (seed, step) on the device of ids, for masks, samples and dropout. It is
                copied first, so it may be changed in place before backward. None: drawn from PyTorch's
                default generator, and different in each process of a group, also if all have one seed.

        Returns:
            ElectraOutput; `rtd_loss` carries gradients too, and so does `mlm_loss` unless the generator is
            uniform. The counts do not.
        """
        self.check_sharing()
        config = self.config
        rng = of_this_process(draw_rng(ids)) if rng is None else rng.clone()
        layout = Layout(key_mask, cu_seqlens, max_seqlen)

        masked = self.mask(ids, rng, layout)
        proposal = self.generator.propose(ids, masked, layout, type_ids=type_ids, rng=rng)
        # Each use passes the word table on to the next (see `SharedEmbedding`).
        words = proposal.table if config.sharing in ("embeddings", "all") else None

        def discriminate(text: Tensor) -> Tensor:
            return self.discriminator(text, type_ids=type_ids, rng=rng, words=words, **layout._asdict())

        if config.objective == "electric":
            noised = add_noise(self.ops, self.generator, ids, masked, proposal, rng)
            rtd = noise_loss(self.ops, discriminate(noised.ids), noised, config)
        else:
            samples = proposal.samples
            if self.generator.everywhere:
                samples = samples.index_select(0, masked.positions)
            corrupt = self.ops.replace_tokens(ids, masked.positions, samples, masked.weights)
            # The end of a packed batch may be padding.
            real = key_mask if cu_seqlens is None else ids != config.pad_id
            real = None if real is None else real.float()
            rtd = self.ops.rtd_loss(discriminate(corrupt.ids), corrupt.replaced, real)

        return ElectraOutput(
            loss=config.mlm_weight * proposal.loss + config.rtd_weight * rtd.loss,
            mlm_loss=proposal.loss,
            rtd_loss=rtd.loss,
            mlm_correct=proposal.correct,
            masked=proposal.weights.sum(),
            rtd_counts=rtd.counts,
        )

    def check_sharing(self) -> None:
        """Raise an error if the towers do not share the modules that `config.sharing` requires.

        Raises:
            ValueError: an embedding was replaced in one tower, or a table has another number of rows.
        """
        if self.config.generator_kind == "uniform":
            self._check_rows(self.discriminator.encoder.embedding.words)
            return
        generator, discriminator = self.generator.encoder, self.discriminator.encoder
        shared = {
            "none": lambda: not _is(generator.embedding, discriminator.embedding),
            "embeddings": lambda: _is(generator.embedding, discriminator.embedding),
            "gdes": lambda: _is(discriminator.embedding.shared, generator.embedding),
            "all": lambda: _is(generator, discriminator),
        }
        if not shared[self.config.sharing]():
            rule = f"share their embedding as sharing={self.config.sharing!r} requires"
            got, remedy = "an embedding that was replaced in one of them", "replace it in both"
            raise ValueError(must("Electra: generator and discriminator", rule, got, remedy))
        self._check_rows(generator.embedding.words)

    def _check_rows(self, words: Tensor) -> None:
        if len(words) != self.config.vocab_size:
            rule = f"be the number of rows of the word table ({len(words)})"
            remedy = "Electra.resize_token_embeddings changes both"
            raise ValueError(must("Electra: vocab_size", rule, self.config.vocab_size, remedy))

    def resize_token_embeddings(
        self, vocab_size: int, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Resize the vocabulary of both halves; arguments and errors as in `PretrainedHalf`."""
        config = dataclasses.replace(self.config, vocab_size=vocab_size)
        resize(self, vocab_size, optimizer)
        self.config = config
        for half in (self.generator, self.discriminator):
            half.config = dataclasses.replace(half.config, vocab_size=vocab_size)

    def mask(self, ids: Tensor, rng: Tensor, layout: Layout = UNPADDED) -> MaskedTokens:
        """Return `ops.mask_tokens` of a batch with the settings of the config."""
        config = self.config
        return self.ops.mask_tokens(
            ids,
            self.candidates(ids),
            rng,
            mask_id=config.mask_id,
            mask_prob=config.mask_prob,
            # A generator that sees the token does not give its probability by the others, as Electric needs.
            keep_prob=0.0 if config.objective == "electric" else config.keep_prob,
            **layout._asdict(),
        )

    def candidates(self, ids: Tensor) -> Tensor:
        """Return a bool mask of the tokens that may be masked: all except special ones."""
        return candidates(self.config, ids)


def _is(first: nn.Module, second: nn.Module) -> bool:
    # Export makes a new proxy of a module at each access. Dynamo does not, and cannot trace `vars(…) is`.
    if not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
        return vars(first) is vars(second)
    return first is second


def _check_shared_parameters(
    model: Electra,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Report shared parameters that differ between the two halves of a state dict: one would be lost."""
    shared = {"embeddings": "electra.embeddings.", "all": "electra."}.get(model.config.sharing)
    for name in [n for n in state_dict if shared and n.startswith(f"{prefix}generator.{shared}")]:
        twin = f"{prefix}discriminator." + name.removeprefix(f"{prefix}generator.")
        if twin in state_dict and not torch.equal(state_dict[name], state_dict[twin]):
            sharing = f"with sharing={model.config.sharing!r} they are one parameter"
            error_msgs.append(f"{name} must equal {twin}: {sharing}")
