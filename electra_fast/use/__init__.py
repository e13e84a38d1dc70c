"""Use a trained ELECTRA: the pre-trained one without further training, or a fine-tuned one.

    model = load("runs/demo")  # a run of pre-training; each function also takes the folder itself
    detect("The cat sat on the banana of the house.", model)  # the words that do not belong
    suggest("The cat sat on the banana of the house.", model)  # and better ones
    score(["I scream for it", "ice cream for it"], model)  # which text is more probable
    choose("The food was cold.", ["terrible", "great"], model)  # an answer without training
    pairs("crows_pairs_anonymized.csv", model)  # how often it prefers the sentence with the stereotype

    Classifier("runs/c")(texts)  # also Tagger, Answerer, Ranker, IntentReader, Writer
    rank(query, documents, "runs/r")  # reply(context, candidates, "runs/r"), intent(text, "runs/i")

One text gives one result, a list of texts a list in the same order. The texts are computed in packed batches,
and a text gives the same result alone and among others.
"""

from electra_fast.use.choose import choose
from electra_fast.use.detect import detect
from electra_fast.use.fine_tuned import Answerer, Classifier, IntentReader, Ranker, Tagger
from electra_fast.use.pairs import pairs
from electra_fast.use.pretrained import Pretrained, load
from electra_fast.use.score import score
from electra_fast.use.suggest import suggest
from electra_fast.use.understand import intent, rank, reply
from electra_fast.use.write import Writer

__all__ = [
    "Answerer",
    "Classifier",
    "IntentReader",
    "Pretrained",
    "Ranker",
    "Tagger",
    "Writer",
    "choose",
    "detect",
    "intent",
    "load",
    "pairs",
    "rank",
    "reply",
    "score",
    "suggest",
]
