"""The configuration of one ELECTRA model: the sizes of both towers and the settings of pre-training."""

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real

from electra_fast.errors import must

SHARING = ("none", "embeddings", "gdes", "all")
OBJECTIVES = {"electra": "masked", "electric": "two_tower"}  # each with its generator
GENERATORS = ("masked", "two_tower", "uniform")
INITIAL_ATTENTION = ("random", "local")


@dataclass(frozen=True)
class ElectraConfig:
    """Sizes and settings of one ELECTRA model (Clark et al. 2020); the defaults are those of `small`.

    ``dataclasses.replace(ElectraConfig.base(), dropout=0.0)`` changes a preset. Two choices follow the code
    published with the paper, where the text of the paper can be read differently:

    - the generator has the depth of the discriminator and a fraction of its width (1/4, base 1/3);
    - ``sharing="embeddings"`` ties the word, position and type tables *and* their LayerNorm.

    ``sharing`` is ``none`` (two separate towers), ``embeddings`` (one embedding for both), ``gdes`` (the
    discriminator adds a learned difference to the generator's tables, which its own loss does not train; He
    et al. 2021) or ``all`` (one encoder for both, which needs towers of equal size).

    ``objective`` is ``electra`` (the discriminator finds replaced tokens) or ``electric`` (it learns the
    energies of tokens by noise-contrastive estimation; Clark et al. 2020b). ``generator`` is ``masked`` (a
    masked language model), ``two_tower`` (a model in each direction, of `generator_layers` each, which
    predicts all tokens), ``uniform`` (no model), or None: that of the objective's paper.

    ``initial_attention`` is ``random`` (all tables and weights are, as in the paper) or ``local`` (a token
    first attends to its neighbours; see `modules.sinusoids` and `modules.SelfAttention`).
    """

    vocab_size: int = 30522
    max_positions: int = 512  # the longest sequence
    type_vocab: int = 2
    embedding: int = 128  # E; a tower of another width projects it

    layers: int = 12  # the discriminator, which is used after pre-training
    hidden: int = 256
    heads: int = 4
    ffn: int = 1024

    generator_layers: int = 12
    generator_hidden: int = 64
    generator_heads: int = 1
    generator_ffn: int = 256

    eps: float = 1e-12  # of every LayerNorm
    initializer: float = 0.02  # standard deviation of a normal distribution, truncated at two of them
    initial_attention: str = "random"
    dropout: float = 0.1  # of embeddings, attention probabilities and both outputs of a layer

    mask_prob: float = 0.15
    keep_prob: float = 0.15  # of the masked positions, share that keeps its token; in Electric all get [MASK]
    temperature: float = 1.0  # of the samples only, not of the generator's loss
    disallow_correct: bool = False  # never sample the original token
    mlm_weight: float = 1.0
    rtd_weight: float = 50.0
    sharing: str = "embeddings"
    objective: str = "electra"
    generator: str | None = None

    pad_id: int = 0
    cls_id: int = 101
    sep_id: int = 102
    mask_id: int = 103

    @classmethod
    def tiny(cls) -> "ElectraConfig":
        """For CPUs and tests: 3 M parameters, of which 2 M are in the word table."""
        return cls(
            embedding=64, layers=4, hidden=128, heads=2, ffn=512,
            generator_layers=4, generator_hidden=64, generator_heads=1, generator_ffn=256,
        )  # fmt: skip

    @classmethod
    def small(cls) -> "ElectraConfig":
        """The paper's small: 14 M parameters, trained on sequences of 128."""
        return cls()

    @classmethod
    def base(cls) -> "ElectraConfig":
        """The paper's base: a discriminator of 109 M parameters."""
        return cls(
            embedding=768, layers=12, hidden=768, heads=12, ffn=3072,
            generator_layers=12, generator_hidden=256, generator_heads=4, generator_ffn=1024,
        )  # fmt: skip

    @classmethod
    def large(cls) -> "ElectraConfig":
        """The paper's large: a discriminator of 335 M parameters; it masks 25 % of the tokens."""
        return cls(
            embedding=1024, layers=24, hidden=1024, heads=16, ffn=4096,
            generator_layers=24, generator_hidden=256, generator_heads=4, generator_ffn=1024,
            mask_prob=0.25,
        )  # fmt: skip

    @property
    def special_ids(self) -> tuple[int, int, int, int]:
        """Ids that are never masked: pad, cls, sep, mask."""
        return self.pad_id, self.cls_id, self.sep_id, self.mask_id

    @property
    def generator_kind(self) -> str:
        """The generator, one of GENERATORS."""
        return self.generator or OBJECTIVES[self.objective]

    def for_generator(self) -> "ElectraConfig":
        """Return this config with the generator's sizes in `layers`, `hidden`, `heads` and `ffn`.

        Every module reads these four fields, so one class is used for both towers.
        """
        return dataclasses.replace(
            self,
            layers=self.generator_layers,
            hidden=self.generator_hidden,
            heads=self.generator_heads,
            ffn=self.generator_ffn,
        )

    def __post_init__(self) -> None:
        for field in _SIZES:
            value = getattr(self, field)
            is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
            self._require(field, is_size, "be a positive integer")
            self._require(field, value < 2**31, "be less than 2^31")
        for field in dataclasses.fields(self):  # a file may contain text instead of a number
            kind = {int: Integral, float: Real}.get(type(field.default), object)
            rule = f"be of type {type(field.default).__name__}"
            self._require(field.name, isinstance(getattr(self, field.name), kind), rule)

        for hidden, heads in (("hidden", "heads"), ("generator_hidden", "generator_heads")):
            H = getattr(self, heads)
            divisible = getattr(self, hidden) % H == 0
            self._require(hidden, divisible, f"be divisible by {heads} ({H})", f"change {heads}")

        for field in ("pad_id", "cls_id", "sep_id", "mask_id"):
            inside = 0 <= getattr(self, field) < self.vocab_size
            rule = f"be in [0, {self.vocab_size}), the vocabulary"
            self._require(field, inside, rule, "take the id from the tokenizer")

        # Each comparison is false for NaN.
        self._require("dropout", 0 <= self.dropout < 1, "be in [0, 1)")
        self._require("mask_prob", 0 < self.mask_prob <= 1, "be in (0, 1]")
        self._require("keep_prob", 0 <= self.keep_prob <= 1, "be in [0, 1]")
        self._require("temperature", 0 < self.temperature < math.inf, "be positive and finite")
        for field in ("eps", "initializer"):
            self._require(field, 0 < getattr(self, field) < math.inf, "be positive and finite")
        for field in ("mlm_weight", "rtd_weight"):
            self._require(field, 0 <= getattr(self, field) < math.inf, "be finite, not negative")

        self._require("sharing", self.sharing in SHARING, f"be one of {', '.join(SHARING)}")
        rule = f"be one of {', '.join(INITIAL_ATTENTION)}"
        self._require("initial_attention", self.initial_attention in INITIAL_ATTENTION, rule)
        self._require_objective()
        if self.sharing == "all":
            for field in ("layers", "hidden", "heads", "ffn"):
                equal = getattr(self, "generator_" + field) == getattr(self, field)
                rule = f"equal {field} ({getattr(self, field)}) when sharing is 'all'"
                self._require("generator_" + field, equal, rule, "or use sharing='embeddings'")

    def _require_objective(self) -> None:
        """Check the objective, the generator, and what they need of other fields."""
        self._require("objective", self.objective in tuple(OBJECTIVES), f"be one of {', '.join(OBJECTIVES)}")
        rule = f"be None or one of {', '.join(GENERATORS)}"
        self._require("generator", self.generator in (None, *GENERATORS), rule)
        kind, where = self.generator_kind, f"with the generator {self.generator_kind}"
        if kind == "two_tower":
            self._require("sharing", self.sharing != "all", f"be none, embeddings or gdes {where}")
        if kind == "uniform":
            self._require("sharing", self.sharing in ("none", "embeddings"), f"be none or embeddings {where}")
        if self.objective == "electric":  # the samples must come from the distribution whose log q is used
            where = "with the objective electric, which needs the probabilities of the samples"
            self._require("temperature", self.temperature == 1, f"be 1 {where}")
            self._require("disallow_correct", not self.disallow_correct, f"be False {where}")
            if kind != "masked":
                rule = "be less than 1 with the objective electric, which needs tokens of the text too"
                self._require("mask_prob", self.mask_prob < 1, rule)

    def _require(self, field: str, satisfied: bool, rule: str, remedy: str = "") -> None:
        if not satisfied:
            raise ValueError(must(f"ElectraConfig: {field}", rule, repr(getattr(self, field)), remedy))


_SIZES = (
    "vocab_size", "max_positions", "type_vocab", "embedding", "layers", "hidden", "heads", "ffn",
    "generator_layers", "generator_hidden", "generator_heads", "generator_ffn",
)  # fmt: skip
