"""ELECTRA's pre-training as a user of transformers writes it; transformers has no class for it.

Two models share one embedding. Masking is that of DataCollatorForLanguageModeling, with 85 % [MASK] and the
rest kept. Logits and loss cover all positions, with label -100 at the unmasked ones; samples are drawn at the
masked positions.
"""

import torch
from torch import Tensor, nn

from electra_fast.config import ElectraConfig
from electra_fast.pretrained import config_to_hugging_face


class HuggingFace(nn.Module):
    synchronizes = True  # indexing by a mask waits for the number of masked positions

    def __init__(self, config: ElectraConfig):
        super().__init__()
        import transformers

        def sized(tower):
            sizes = config_to_hugging_face(tower)
            return transformers.ElectraConfig(**sizes, attn_implementation="sdpa")

        self.config = config
        self.generator = transformers.ElectraForMaskedLM(sized(config.for_generator()))
        self.discriminator = transformers.ElectraForPreTraining(sized(config))
        self.discriminator.electra.embeddings = self.generator.electra.embeddings

    def forward(self, ids: Tensor, key_mask: Tensor) -> Tensor:
        config = self.config
        probability = torch.full(ids.shape, config.mask_prob, device=ids.device)
        special = torch.isin(ids, torch.tensor(config.special_ids, device=ids.device))
        masked = torch.bernoulli(probability.masked_fill(special, 0)).bool()
        labels = ids.masked_fill(~masked, -100)
        hidden = masked & (torch.rand(ids.shape, device=ids.device) >= config.keep_prob)
        masked_ids = ids.masked_fill(hidden, config.mask_id)

        generator = self.generator(masked_ids, attention_mask=key_mask, labels=labels)
        with torch.no_grad():
            p = generator.logits[masked].float().softmax(-1)
            corrupt = ids.clone()
            corrupt[masked] = torch.multinomial(p, 1)[:, 0]
        labels = (corrupt != ids).long()
        discriminator = self.discriminator(corrupt, attention_mask=key_mask, labels=labels)
        return config.mlm_weight * generator.loss + config.rtd_weight * discriminator.loss

    def logits(self, ids: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of both halves, for the gate."""
        halves = (self.generator, self.discriminator)
        return tuple(half(ids, attention_mask=key_mask).logits for half in halves)
