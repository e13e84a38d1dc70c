"""The methods of a model that transformers' Trainer and accelerate use, for both halves of a pretrainer."""

from torch import nn


class TrainerMethods:
    """Methods with the names and signatures of `PreTrainedModel`, applied to both halves of an ELECTRA."""

    generator: nn.Module
    discriminator: nn.Module
    share_embeddings: bool

    _keys_to_ignore_on_save = None  # Trainer reads this if a checkpoint lacks keys.

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes whose modules accelerate wraps individually for FSDP."""
        return sorted({name for half in self._halves() for name in half._no_split_modules or ()})

    def _halves(self) -> tuple[nn.Module, nn.Module]:
        return self.generator, self.discriminator

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **options
    ) -> None:
        """Recompute the activations of both encoders in the backward pass.

        Args:
            activation_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`.
            options: ``every_n_layers`` and ``offload``, if the installed transformers has them.
        """
        for half in self._halves():
            # transformers before 5.23 has only the older name.
            newer = getattr(half, "activation_checkpointing_enable", None)
            (newer or half.gradient_checkpointing_enable)(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Store the activations of both encoders for the backward pass."""
        for half in self._halves():
            newer = getattr(half, "activation_checkpointing_disable", None)
            (newer or half.gradient_checkpointing_disable)()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether a layer of either half recomputes its activations."""
        return any(
            getattr(layer, "gradient_checkpointing", False) for h in self._halves() for layer in h.modules()
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **options
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    gradient_checkpointing_disable = activation_checkpointing_disable
    is_gradient_checkpointing = is_activation_checkpointing

    def enable_input_require_grads(self) -> None:
        """Make the output of the word embeddings require gradients, for adapters in frozen encoders."""
        for half in self._halves():
            half.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        for half in self._halves():
            half.disable_input_require_grads()

    def get_input_embeddings(self) -> nn.Module:
        """Return the generator's word embeddings, which the discriminator may share."""
        return self.generator.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the generator's head; accelerate needs it to shard tied tables together."""
        return self.generator.get_output_embeddings()

    def tie_weights(self, **options) -> None:
        """Tie the weights of each half, and share the generator's embeddings again."""
        for half in self._halves():
            half.tie_weights(**options)
        if self.share_embeddings:
            self.discriminator.base_model.embeddings = self.generator.base_model.embeddings

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters of both halves; shared parameters count once."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in counted if not (exclude_embeddings and id(p) in tables))
