"""ELECTRA's pre-training task for two models of transformers: one forward pass, from token ids to a loss.

    pretrainer = ElectraPretrainer(generator, discriminator, tokenizer)
    Trainer(pretrainer, args, DataCollatorWithPadding(tokenizer), train_dataset=texts).train()
    discriminator.save_pretrained("my-electra")

The mathematics are `electra_fast.Electra`'s; the encoders stay transformers' own. `patch(pretrainer)` fuses
them too.
"""

import functools
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from electra_fast import ops, reference
from electra_fast.hf import halves
from electra_fast.hf.fused import more_than
from electra_fast.hf.heads import MaskedLM
from electra_fast.hf.inputs import read_batch, refuse
from electra_fast.hf.patching import mixin_of
from electra_fast.hf.trainer import TrainerMethods
from electra_fast.modules import draw_rng
from electra_fast.reference import MaskedTokens, MLMHead


@dataclass
class ElectraPretrainerOutput(ModelOutput):
    """As `electra_fast.model.ElectraOutput`; the three losses carry gradients."""

    loss: Tensor | None = None  # [] mlm_weight * mlm_loss + rtd_weight * rtd_loss
    mlm_loss: Tensor | None = None  # [] mean over the masked positions
    rtd_loss: Tensor | None = None  # [] mean over the real tokens
    mlm_correct: Tensor | None = None  # [] masked positions whose most likely token is the original
    masked: Tensor | None = None  # [] masked positions
    rtd_counts: Tensor | None = None  # [4] true positives, false positives, false and true negatives


class ElectraPretrainer(TrainerMethods, nn.Module):
    """A masked language model and a model with one logit a token, trained together as ELECTRA.

    The discriminator is given the generator's embedding: word, position and type tables and their LayerNorm.
    The two halves stay what they were, and `save_pretrained` of each writes a model for transformers alone.

    Args:
        generator: a model ``…ForMaskedLM``. ELECTRA's and BERT's heads see the masked positions alone; any
            other runs as it is, at every position, which is correct and slower.
        discriminator: ``ElectraForPreTraining``, or a model ``…ForTokenClassification`` with one label, of
            the same vocabulary.
        tokenizer: transformers' tokenizer of the data. It says which id is [MASK], and which ids are special
            and never masked; [UNK] is not one of them, as in the paper.
        mask_id: the id of [MASK], where there is no tokenizer.
        special_ids: what is never masked, where there is no tokenizer. Without either, 30,522 tokens are
            taken for BERT's uncased ones, and a first batch that does not begin with [CLS] is refused.
        share_embeddings: False leaves both halves the embeddings that they have.
        mask_prob: share of the tokens that is masked.
        keep_prob: share of the masked positions that keeps its token.
        mlm_weight: of the generator's loss in the sum.
        rtd_weight: of the discriminator's.
        temperature: of the samples.
        disallow_correct: never sample the original token.

    Raises:
        TypeError, ValueError: the two do not make an ELECTRA, or the special ids cannot be known.
    """

    # Trainer would take a `**kwargs` for a loss that it need not divide by the number of micro-batches.
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
        # Trainer writes a state dict with safetensors, which takes no tensor by two names.
        self.register_state_dict_post_hook(_leave_out_twins)
        self.register_load_state_dict_pre_hook(_put_back_twins)

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
        """Mask, generate, discriminate: the losses of one micro-batch, the held-out ones in evaluation.

        Args:
            input_ids: ``[B, L]`` or, packed, ``[1, T]``, int32 or int64: the text itself, nothing masked.
            attention_mask: ``[B, L]``, 1 = real; None: every token is.
            token_type_ids: the segment of each token; None: 0 everywhere.
            position_ids: the place of each token; None: in order.
            rng: int64 ``[2]`` = (seed, step) on the device of the ids; it decides masks and samples. None:
                drawn from PyTorch's default generator, where the encoders' dropout comes from too.
            return_loss: Trainer evaluates a batch without labels only where this name is.
            options: ``cu_seq_lens_q`` and the others that `DataCollatorWithFlattening` makes, for encoders
                whose attention knows them: "electra_fast" or a flash one.

        Raises:
            TypeError, ValueError: an argument breaks these rules, or the halves no longer share what they
                did. IndexError: an id outside the vocabulary, on the CPU.
        """
        halves.check_sharing(self.generator, self.discriminator, self.share_embeddings)
        tensors = (input_ids, attention_mask, token_type_ids, position_ids)
        batch = read_batch((self.generator, self.discriminator), *tensors, options)
        self._check_guess(input_ids)
        rng = draw_rng(input_ids) if rng is None else rng

        masked = ops.mask_tokens(
            batch.ids,
            self._candidates(batch.ids),
            rng,
            mask_id=self.special.mask,
            mask_prob=self.mask_prob,
            keep_prob=self.keep_prob,
            **batch.layout,
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
        """Refuse a first batch that is not of the vocabulary whose special ids were assumed."""
        if self.special.first is None:
            return
        wrong = ids[:, 0] != self.special.first
        if wrong.any():
            rule = f"begin with [CLS], {self.special.first}, where BERT's vocabulary is assumed"
            remedy = "pass the tokenizer, or mask_id= and special_ids="
            refuse("input_ids", rule, ids[wrong][0, 0].item(), remedy)
        self.special = self.special._replace(first=None)

    def _candidates(self, ids: Tensor) -> Tensor:
        """Return which tokens may be masked if they are real: all but the special ones, bool."""
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
        """Return one logit a token, shape of ids."""
        logits = getattr(self.discriminator(ids, **encoder), "logits", None)
        if logits is None or logits.shape not in (ids.shape, (*ids.shape, 1)):
            got = "none" if logits is None else f"logits of shape {list(logits.shape)}"
            remedy = "take ElectraForPreTraining, or a …ForTokenClassification with num_labels=1"
            refuse("discriminator", f"give one logit a token, {list(ids.shape)}", got, remedy)
        return logits.view(ids.shape)


def _head(generator: PreTrainedModel) -> tuple[nn.Module, nn.Linear] | None:
    """Return what comes before the vocabulary and the projection to it, where they are what they seem."""
    mixin = mixin_of(generator)  # of no subclass with a forward pass of its own
    if mixin is None or not issubclass(mixin, MaskedLM):
        return None
    decoder = generator.get_submodule(mixin.decoder)
    # An adapter around the projection computes something else, and no op reads quantised weights.
    return None if more_than(decoder, nn.Linear) else (generator.get_submodule(mixin.transform), decoder)


def _twins(module: nn.Module) -> dict[str, str]:
    """Return the first name of what has several, by each of its other names."""
    first = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in named if first.setdefault(p, name) != name}


def _leave_out_twins(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for name in _twins(module):
        state_dict.pop(prefix + name)


def _put_back_twins(
    module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict, strict: bool,
    missing_keys: list, unexpected_keys: list, error_msgs: list,
) -> None:  # fmt: skip
    for name, first in _twins(module).items():
        if (shared := state_dict.get(prefix + first)) is not None:
            if not torch.equal(state_dict.setdefault(prefix + name, shared), shared):
                error_msgs.append(f"{prefix}{name} must equal {prefix}{first}: the model has one of them")
