"""What transformers' Trainer and accelerate ask of a model beside its forward pass, for two models in one."""

from torch import nn


class TrainerMethods:
    """Methods of `PreTrainedModel` under its names and signatures, each for both halves of an ELECTRA."""

    generator: nn.Module
    discriminator: nn.Module
    share_embeddings: bool

    _keys_to_ignore_on_save = None  # Trainer reads it if a checkpoint lacks keys

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes that accelerate wraps one by one for FSDP."""
        return sorted({name for half in self._halves() for name in half._no_split_modules or ()})

    def _halves(self) -> tuple[nn.Module, nn.Module]:
        return self.generator, self.discriminator

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **options
    ) -> None:
        """Compute both encoders' activations again in the backward pass.

        Args:
            activation_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`.
            options: ``every_n_layers`` and ``offload``, if the installed transformers has them.
        """
        for half in self._halves():
            # transformers before 5.23 has the older name alone.
            newer = getattr(half, "activation_checkpointing_enable", None)
            (newer or half.gradient_checkpointing_enable)(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep the activations of both encoders for the backward pass."""
        for half in self._halves():
            newer = getattr(half, "activation_checkpointing_disable", None)
            (newer or half.gradient_checkpointing_disable)()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether a layer of either half computes its activations again."""
        return any(
            getattr(layer, "gradient_checkpointing", False) for h in self._halves() for layer in h.modules()
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **options
    ) -> None:
        """Do what `activation_checkpointing_enable` does; this is its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    gradient_checkpointing_disable = activation_checkpointing_disable
    is_gradient_checkpointing = is_activation_checkpointing

    def enable_input_require_grads(self) -> None:
        """Make the output of the word embeddings require a gradient, for adapters in frozen encoders."""
        for half in self._halves():
            half.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        for half in self._halves():
            half.disable_input_require_grads()

    def get_input_embeddings(self) -> nn.Module:
        """Return the generator's word embeddings, which are the discriminator's too if they are shared."""
        return self.generator.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the generator's head; accelerate shards tied tables together if it knows both."""
        return self.generator.get_output_embeddings()

    def tie_weights(self, **options) -> None:
        """Tie the weights of each half, and share the generator's embeddings again."""
        for half in self._halves():
            half.tie_weights(**options)
        if self.share_embeddings:
            self.discriminator.base_model.embeddings = self.generator.base_model.embeddings

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters of both halves; what they share counts once."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in counted if not (exclude_embeddings and id(p) in tables))
