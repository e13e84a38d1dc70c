"""Small models of transformers to patch, a batch for each, and their results."""

import torch
import transformers

SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 96, "max_position_embeddings": 40}
HEADS = ("Model", "ForPreTraining", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
HEADS += ("ForQuestionAnswering", "ForMultipleChoice")
MODELS = [family + head for family in ("Electra", "Bert") for head in HEADS]
B, L = 3, 20


def build(name="ElectraForPreTraining", dropout=0.0, **change):
    family = "Electra" if name.startswith("Electra") else "Bert"
    sizes = SIZES | ({"embedding_size": 32} if family == "Electra" else {})
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "summary_last_dropout")
    sizes |= dict.fromkeys(names, dropout) | change
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes)).train()


def encoder_decoder(family="Electra", dropout=0.0, **change):
    """An encoder and a decoder with weights so large that a generated text is not one token repeated."""
    sizes = SIZES | {"initializer_range": 0.3} | ({"embedding_size": 32} if family == "Electra" else {})
    sizes |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout) | change
    config = getattr(transformers, f"{family}Config")
    decoder = config(**sizes, is_decoder=True, add_cross_attention=True)
    configs = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config(**sizes), decoder)
    configs.decoder_start_token_id, configs.pad_token_id, configs.eos_token_id = 101, 0, 102
    return transformers.EncoderDecoderModel(config=configs).eval()


def batch(name="ElectraForPreTraining"):
    """Ids with padding, types, and the labels of the model."""
    real = torch.arange(L) < torch.tensor([L, 7, 1])[:, None]
    ids = torch.randint(104, 300, (B, L)) * real
    inputs = {"input_ids": ids, "attention_mask": real.long(), "token_type_ids": ids % 2}
    masked = torch.where(torch.rand(B, L) < 0.3, ids, -100)
    masked[0, 0] = 5
    head = name.removeprefix("Electra").removeprefix("Bert")
    labels = {
        "ForPreTraining": {"labels": torch.randint(0, 2, (B, L))},
        "ForMaskedLM": {"labels": masked},
        "ForSequenceClassification": {"labels": torch.randint(0, 2, (B,))},
        "ForTokenClassification": {"labels": torch.randint(0, 2, (B, L))},
        "ForQuestionAnswering": {k: torch.randint(0, 7, (B,)) for k in ("start_positions", "end_positions")},
        "ForMultipleChoice": {"labels": torch.zeros(1, dtype=torch.long)},
    }.get(head, {})
    if name == "BertForPreTraining":
        labels = {"labels": masked, "next_sentence_label": torch.randint(0, 2, (B,))}
    if head == "ForMultipleChoice":  # one example of three choices
        inputs = {k: x[None] for k, x in inputs.items()}
    return inputs | labels


def outcome(model, inputs):
    """Return by name the output tensors of a model, and the gradients of their weighted sum or the loss."""
    model.zero_grad()
    out = {k: x for k, x in model(**inputs).items() if isinstance(x, torch.Tensor)}
    generator = torch.Generator().manual_seed(0)
    loss = out.get("loss")
    if loss is None:
        loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in out.values())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {k: x.detach() for k, x in out.items()}, gradients
