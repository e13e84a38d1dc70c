"""ELECTRA's pre-training task for two models of transformers: one forward pass, from token ids to a loss.

    pretrainer = ElectraPretrainer(generator, discriminator, tokenizer)
    Trainer(pretrainer, args, DataCollatorWithPadding(tokenizer), train_dataset=texts).train()
    discriminator.save_pretrained("my-electra")

The computation is that of `electra_fast.Electra`, with the encoders of transformers. `patch(pretrainer)`
fuses these too.
"""

import functools
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from electra_fast import ops, reference
from electra_fast.distributed import of_this_process
from electra_fast.errors import must
from electra_fast.hf import halves
from electra_fast.hf.fused import why_not_plain
from electra_fast.hf.heads import MaskedLM
from electra_fast.hf.inputs import CALL, read_batch
from electra_fast.hf.patching import mixin_of
from electra_fast.hf.trainer import TrainerMethods
from electra_fast.modules import draw_rng
from electra_fast.reference import MaskedTokens, MLMHead


@dataclass
class ElectraPretrainerOutput(ModelOutput):
    """Like `electra_fast.model.ElectraOutput`; the three losses have gradients."""

    loss: Tensor | None = None  # [] mlm_weight * mlm_loss + rtd_weight * rtd_loss
    mlm_loss: Tensor | None = None  # [] mean over the masked positions
    rtd_loss: Tensor | None = None  # [] mean over the real tokens
    mlm_correct: Tensor | None = None  # [] number of masked positions whose most likely token is the original
    masked: Tensor | None = None  # [] number of masked positions
    rtd_counts: Tensor | None = None  # [4] true positives, false positives, false and true negatives


class ElectraPretrainer(TrainerMethods, nn.Module):
    """A masked language model and a model with one logit per token, trained together as ELECTRA.

    The discriminator gets the generator's embedding: word, position and type tables and their LayerNorm. The
    two halves remain models of transformers, and `save_pretrained` of each writes a model that needs only
    transformers.

    Args:
        generator: a model ``…ForMaskedLM``. The heads of ELECTRA and BERT compute only the masked positions;
            any other model computes every position, which is correct but slower.
        discriminator: ``ElectraForPreTraining``, or a model ``…ForTokenClassification`` with one label, with
            the same vocabulary.
        tokenizer: transformers' tokenizer of the data. It determines the id of [MASK] and the special ids,
            which are never masked; [UNK] is not one of them, as in the paper.
        mask_id: the id of [MASK], if there is no tokenizer.
        special_ids: the ids that are never masked, if there is no tokenizer. Without tokenizer and ids, a
            vocabulary of 30,522 tokens is assumed to be BERT's uncased one, and a first batch that does not
            begin with [CLS] raises an error.
        share_embeddings: False leaves both halves their own embeddings.
        mask_prob: share of the tokens that are masked.
        keep_prob: share of the masked positions that keep their token.
        mlm_weight: weight of the generator's loss in the sum.
        rtd_weight: weight of the discriminator's loss.
        temperature: temperature of the sampling.
        disallow_correct: never sample the original token.

    Raises:
        TypeError, ValueError: the two models do not form an ELECTRA, or the special ids are unknown.
    """

    # From `**options` Trainer would conclude that it need not divide the loss by the number of micro-batches.
    accepts_loss_kwargs = False

    def __init__(
        self,
        generator: PreTrainedModel,
        discriminator: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        mask_id: int | None = None,
        special_ids: Collection[int] | None = None,
        share_embeddings: bool = True,
        mask_prob: float = 0.15,
        keep_prob: float = 0.15,
        mlm_weight: float = 1.0,
        rtd_weight: float = 50.0,
        temperature: float = 1.0,
        disallow_correct: bool = False,
    ):
        super().__init__()
        halves.check_halves(generator, discriminator)
        self.special = halves.special_ids_of(generator, tokenizer, mask_id, special_ids)
        if share_embeddings:
            halves.share_embeddings(generator, discriminator)
        self.generator = generator
        self.discriminator = discriminator
        self.share_embeddings = share_embeddings
        self.mask_prob, self.keep_prob = mask_prob, keep_prob
        self.mlm_weight, self.rtd_weight = mlm_weight, rtd_weight
        self.temperature, self.disallow_correct = temperature, disallow_correct
        # Trainer saves state dicts with safetensors, which refuses a tensor with two names.
        self.register_state_dict_post_hook(_remove_aliases)
        self.register_load_state_dict_pre_hook(_restore_aliases)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        rng: Tensor | None = None,
        return_loss: bool = True,
        **options,
    ) -> ElectraPretrainerOutput:
        """Mask, generate, discriminate: return the losses of one micro-batch.

        Args:
            input_ids: ``[B, L]`` or, packed, ``[1, T]``, int32 or int64: the text, with no token masked.
            attention_mask: ``[B, L]``, 1 = real; None: every token is.
            token_type_ids: the segment of each token; None: 0 everywhere.
            position_ids: the position of each token; None: consecutive positions.
            rng: int64 ``[2]`` = (seed, step) on the device of the ids; masks and samples are a function of
                it. None: drawn from PyTorch's default generator, as is the encoders' dropout, and different
                in each process of a group, also if all have one seed. Processes that share one batch, as in
                tensor parallelism, need one rng.
            return_loss: ignored; Trainer evaluates batches without labels only if a parameter has this name.
            options: ``cu_seq_lens_q`` and the other arguments that `DataCollatorWithFlattening` makes, for
                encoders whose attention supports them: "electra_fast" or a flash attention.

        Raises:
            TypeError, ValueError: an argument breaks these rules, the halves no longer share their
                embedding, or `fully_shard` was called on one of them. IndexError: an id is outside the
                vocabulary, on the CPU.
        """
        halves.check_units(self.generator, self.discriminator)
        halves.check_sharing(self.generator, self.discriminator, self.share_embeddings)
        tensors = (input_ids, attention_mask, token_type_ids, position_ids)
        batch = read_batch((self.generator, self.discriminator), *tensors, options)
        self._check_guess(input_ids)
        rng = of_this_process(draw_rng(input_ids)) if rng is None else rng

        masked = ops.mask_tokens(
            batch.ids,
            self._candidates(batch.ids),
            rng,
            mask_id=self.special.mask,
            mask_prob=self.mask_prob,
            keep_prob=self.keep_prob,
            **batch.layout._asdict(),
        )
        mlm = self._generate(masked._replace(ids=masked.ids.view_as(input_ids)), rng, batch.encoder)
        corrupt = ops.replace_tokens(input_ids, masked.positions, mlm.samples, masked.weights)
        logits = self._discriminate(corrupt.ids, batch.encoder)
        real = None if attention_mask is None else attention_mask.float()
        rtd = ops.rtd_loss(logits, corrupt.replaced, real)

        return ElectraPretrainerOutput(
            loss=self.mlm_weight * mlm.loss + self.rtd_weight * rtd.loss,
            mlm_loss=mlm.loss,
            rtd_loss=rtd.loss,
            mlm_correct=mlm.correct,
            masked=masked.weights.sum(),
            rtd_counts=rtd.counts,
        )

    def _check_guess(self, ids: Tensor) -> None:
        """Raise an error if the first batch contradicts the vocabulary whose special ids were assumed."""
        if self.special.first is None:
            return
        wrong = ids[:, 0] != self.special.first
        if wrong.any():
            rule = f"begin with [CLS], {self.special.first}, as BERT's vocabulary is assumed"
            remedy = "pass the tokenizer, or mask_id= and special_ids="
            raise ValueError(must(f"{CALL}input_ids", rule, ids[wrong][0, 0].item(), remedy))
        self.special = self.special._replace(first=None)

    def _candidates(self, ids: Tensor) -> Tensor:
        """Return which tokens can be masked if they are real, bool: all except the special ones."""
        return functools.reduce(torch.logical_and, [ids != special for special in self.special.unmasked])

    def _generate(self, masked: MaskedTokens, rng: Tensor, encoder: dict) -> MLMHead:
        """Return the generator's loss at the masked positions, and a sample for each of them."""
        slots = (masked.targets, masked.weights, rng)
        draw = {"temperature": self.temperature, "disallow_correct": self.disallow_correct}
        if head := _head(self.generator):
            transform, decoder = head
            x = self.generator.base_model(masked.ids, **encoder)[0]  # [B, L, W]
            x = transform(x.flatten(0, 1).index_select(0, masked.positions))  # [M, E]
            return ops.mlm_head(x, decoder.weight, decoder.bias, *slots, **draw)
        logits = self.generator(masked.ids, **encoder).logits  # [B, L, V]
        return reference.mlm_of_logits(logits.flatten(0, 1).index_select(0, masked.positions), *slots, **draw)

    def _discriminate(self, ids: Tensor, encoder: dict) -> Tensor:
        """Return one logit per token, in the shape of the ids."""
        logits = getattr(self.discriminator(ids, **encoder), "logits", None)
        if logits is None or logits.shape not in (ids.shape, (*ids.shape, 1)):
            got = "none" if logits is None else f"logits of shape {list(logits.shape)}"
            rule = f"return one logit per token, {list(ids.shape)}"
            remedy = "use ElectraForPreTraining, or a …ForTokenClassification with num_labels=1"
            raise ValueError(must(f"{CALL}discriminator", rule, got, remedy))
        return logits.view(ids.shape)


def _head(generator: PreTrainedModel) -> tuple[nn.Module, nn.Linear] | None:
    """Return the transform and the projection to the vocabulary, None if a kernel cannot replace the head."""
    mixin = mixin_of(generator)  # None for a subclass with a forward pass of its own
    if mixin is None or not issubclass(mixin, MaskedLM):
        return None
    decoder = generator.get_submodule(mixin.decoder)
    # The projection must not have an adapter or quantised weights, which no op supports.
    return None if why_not_plain(decoder, nn.Linear) else (generator.get_submodule(mixin.transform), decoder)


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return {other name: first name} of the parameters with several names."""
    first = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in named if first.setdefault(p, name) != name}


def _remove_aliases(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for name in _aliases(module):
        state_dict.pop(prefix + name)


def _restore_aliases(
    module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict, strict: bool,
    missing_keys: list, unexpected_keys: list, error_msgs: list,
) -> None:  # fmt: skip
    for name, first in _aliases(module).items():
        if (shared := state_dict.get(prefix + first)) is not None:
            if not torch.equal(state_dict.setdefault(prefix + name, shared), shared):
                error_msgs.append(f"{prefix}{name} must equal {prefix}{first}: both are the same parameter")
