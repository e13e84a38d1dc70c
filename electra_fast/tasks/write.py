"""Writing: a text for each source, such as a title, a summary or an answer."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from electra_fast.config import ElectraConfig
from electra_fast.decoder import EncoderDecoder
from electra_fast.distributed import ALONE, World
from electra_fast.errors import must
from electra_fast.tasks.details import MOST, Section
from electra_fast.tasks.examples import token_ids
from electra_fast.tasks.generation import generate, generator, sequences, target_log_probs, text_of
from electra_fast.tasks.items import Writing
from electra_fast.tasks.readers import writings
from electra_fast.tasks.task import EVALUATION_TOKENS, Task
from electra_fast.tasks.text_scores import bleu, rouge_l
from electra_fast.tasks.written import WriteExamples, write_examples

FIRST_WORDS = 5  # of the source, as the baseline
SHOWN = 200  # characters of a source on the page


class Prediction(NamedTuple):
    text: str
    log_prob: float  # of the target, not of the text; NaN without one
    tokens: int  # of the target, [SEP] included


class Write(Task):
    """The loss is the mean cross entropy of the target's tokens; predictions are by greedy or beam search."""

    name, metric = "write", "rouge_l"
    head_class = EncoderDecoder
    layer_decay = 1.0
    dev_items = 64
    fixed_shapes = False
    baseline: ClassVar[str] = f"the first {FIRST_WORDS} words of the source"

    def read(self, paths: Sequence[str], role: str) -> list[Writing]:
        options = self.options
        return writings(paths, options.source, options.target, options.columns or None)

    def learn(self, items: Sequence[Writing]) -> None:
        """Compute the baseline once, because a run without the packages would end in an error after hours."""
        self.majority(items[:1], items)

    def use(self, described: dict[str, Any]) -> None:
        """An `EncoderDecoder` has no labels."""

    def unlabelled(self, items: Sequence[Writing]) -> str | None:
        places = (item.where for item in items if item.target is None)
        return next((f"{where}: there is no target; name its column with --target" for where in places), None)

    def texts(self, items: Sequence[Writing]) -> Iterator[str]:
        for item in items:
            yield from (item.source, item.target or "")

    def head(self, config: ElectraConfig) -> EncoderDecoder:
        return EncoderDecoder(config)

    def started(self, folder: str | Path, **changes: Any) -> EncoderDecoder:
        return EncoderDecoder.on_discriminator(folder, **changes)

    @property
    def longest(self) -> str:
        return f"{self.max_len} tokens, or {self.max_target} of a target"

    def examples(self, items: Sequence[Writing], tokenizer: Any) -> WriteExamples:
        sources = token_ids([item.source for item in items], tokenizer)
        targets = token_ids([item.target or "" for item in items], tokenizer)
        for item, source, target in zip(items, sources, targets, strict=True):
            if not source:
                raise ValueError(must(f"{item.where}: the source", "have a token", repr(item.source)))
            if item.target is not None and not target:
                raise ValueError(must(f"{item.where}: the target", "have a token", repr(item.target)))
        return write_examples(sources, targets, tokenizer, self.max_len, self.max_target)

    def loss_of(
        self, model: EncoderDecoder, *, labels: Tensor, rng: Tensor | None = None, **batch: Any
    ) -> Tensor:
        return model(*sequences(batch), labels, rng=rng)

    def predict(
        self,
        model: EncoderDecoder,
        examples: WriteExamples,
        items: Sequence[Writing],
        progress: bool = False,
        world: World = ALONE,
    ) -> list[Prediction]:
        options = {"beams": self.options.beams, "new_tokens": self.max_target - 1}  # [SEP], but not [CLS]
        found = generate(generator(model), examples.sources(), **options, progress=progress, world=world)
        texts = [text_of(examples.tokenizer, ids) for ids in found]
        device = next(model.parameters()).device.type
        log_probs = target_log_probs(model, examples, EVALUATION_TOKENS[device], world)
        each = zip(items, texts, log_probs, examples.targets.lengths.tolist(), strict=True)
        return [
            Prediction(text, math.nan if item.target is None else log_prob, length - 1)
            for item, text, log_prob, length in each
        ]

    def metrics(self, items: Sequence[Writing], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return ROUGE-L (mean), BLEU, and the perplexity per token of the targets."""
        scores = _scores([found.text for found in predictions], [item.target for item in items])
        nats = -math.fsum(found.log_prob for found in predictions) / sum(
            found.tokens for found in predictions
        )
        return scores | {"perplexity": math.exp(min(nats, 700.0))}  # larger ones are not floats

    def record(self, item: Writing, prediction: Prediction) -> dict[str, Any]:
        log_prob = None if item.target is None else prediction.log_prob
        found = {"source": item.source, "target": item.target, "predicted": prediction.text}
        return found | {"target_log_prob": log_prob}

    def majority(self, items: Sequence[Writing], train: Sequence[Writing]) -> dict[str, float]:
        """Return the metrics of the first words of each source."""
        first = [" ".join(item.source.split()[:FIRST_WORDS]) for item in items]
        return _scores(first, [item.target for item in items]) | {"perplexity": math.nan}

    def details(self, items: Sequence[Writing], predictions: Sequence[Prediction]) -> list[Section]:
        shown = list(zip(items, predictions, strict=True))[:MOST]
        rows = [tuple(self.shown(*each).values()) for each in shown]
        note = f"The first {len(rows)} of {len(items)}."
        return [Section("Samples", tuple(self.shown(*shown[0])), rows, note)]

    def error(self, item: Writing, prediction: Prediction) -> float:
        return 1 - rouge_l([prediction.text], [item.target])[0]

    def shown(self, item: Writing, prediction: Prediction) -> dict[str, Any]:
        beginning = item.source[:SHOWN] + "…" * (len(item.source) > SHOWN)
        return {
            "source": beginning,
            "target": item.target,
            "predicted": prediction.text,
            "ROUGE-L": rouge_l([prediction.text], [item.target])[0],
        }


def _scores(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    each = rouge_l(written, wanted)
    return {"rouge_l": math.fsum(each) / len(each), "bleu": bleu(written, wanted)}
