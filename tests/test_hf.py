"""The encoders of transformers with this package's attention: the same results, and clear errors."""

import copy

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    ElectraConfig,
    ElectraForPreTraining,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
)

import electra_fast.hf

SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 96, "max_position_embeddings": 40}
MODELS = {"electra": (ElectraModel, ElectraConfig), "bert": (BertModel, BertConfig)}
MODELS |= {"roberta": (RobertaModel, RobertaConfig)}


def pair(name="electra", dropout=0.0, **change):
    """A model with transformers' eager attention and a copy with ours."""
    cls, config = MODELS[name]
    config = config(**SIZES, attention_probs_dropout_prob=dropout, hidden_dropout_prob=0.0, **change)
    theirs = cls(config).train()
    theirs.set_attn_implementation("eager")
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("electra_fast")
    return ours, theirs


def batch(*lengths, L=20):
    ids = torch.randint(104, 300, (len(lengths), L))
    attention_mask = (torch.arange(L) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": attention_mask}


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager_attention(name):
    ours, theirs = pair(name)
    inputs = batch(20, 7, 1)
    real = inputs["attention_mask"].bool()
    a, b = (model(**inputs).last_hidden_state[real] for model in (ours, theirs))
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    upstream = torch.randn_like(a)
    for y in (a, b):
        (y * upstream).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=5e-5, rtol=5e-4, msg=name)


def test_padding_is_not_attended_to():
    ours, _ = pair()
    inputs = batch(20, 7)
    before = ours(**inputs).last_hidden_state[1, :7]
    inputs["input_ids"][1, 7:] = 5
    assert torch.equal(before, ours(**inputs).last_hidden_state[1, :7])


def test_from_pretrained_accepts_the_name(tmp_path):
    ours, theirs = pair()
    theirs.save_pretrained(tmp_path)
    again = ElectraModel.from_pretrained(tmp_path, attn_implementation="electra_fast").train()
    inputs = batch(20, 7)
    assert torch.equal(again(**inputs).last_hidden_state, ours(**inputs).last_hidden_state)


def test_packed_sequences_equal_padded_ones():
    ours, _ = pair()
    inputs = batch(20, 7, 3)
    expected = ours(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    rows = zip(*inputs.values(), strict=True)
    documents = [{"input_ids": ids[: mask.sum()].tolist()} for ids, mask in rows]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed = collator(documents)
    packed.pop("labels")
    packed = {k: torch.as_tensor(x) if k == "input_ids" else x for k, x in packed.items()}
    result = ours(**packed).last_hidden_state
    torch.testing.assert_close(result[0], expected, atol=1e-5, rtol=1e-5)


def test_dropout_obeys_manual_seed():
    ours, _ = pair(dropout=0.5)
    inputs, outputs = batch(20, 7), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(ours(**inputs).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    ours.eval()
    assert torch.equal(ours(**inputs).last_hidden_state, ours(**inputs).last_hidden_state)


# Dynamo instantiates the class; PyTorch warns about that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_no_graph_break():
    ours, _ = pair(dropout=0.1)
    inputs = batch(20, 7)
    torch._dynamo.reset()
    torch.compile(ours, fullgraph=True, backend="aot_eager")(**inputs).last_hidden_state.sum().backward()


def test_a_decoder_is_causal():
    ours, theirs = pair("bert", is_decoder=True, use_cache=False)
    inputs = batch(20, 7)
    real = inputs["attention_mask"].bool()
    a, b = (model(**inputs).last_hidden_state[real] for model in (ours, theirs))
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_a_structured_mask_is_refused():
    ours, _ = pair()
    ids = batch(20, 7)["input_ids"]
    with pytest.raises(
        NotImplementedError, match=r"electra_fast.hf: attention_mask must be \[B, 20\] or bool \[B"
    ):
        ours(ids, attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="mask_function must be bidirectional or causal"):
        electra_fast.hf.mask(mask_function=lambda b, h, q, k: q == k)


def test_attention_weights_are_refused():
    ours, _ = pair()
    with pytest.raises(NotImplementedError, match="output_attentions must be False"):
        ours(**batch(20, 7), output_attentions=True)


def test_a_decoder_with_cross_attention():
    ours, theirs = pair("bert", is_decoder=True, add_cross_attention=True)
    states = {"encoder_hidden_states": torch.randn(2, 9, 64)}
    states["encoder_attention_mask"] = torch.arange(9) < torch.tensor([9, 4])[:, None]
    inputs = batch(20, 7)
    a, b = (model(**inputs, **states).last_hidden_state for model in (ours, theirs))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(a[real], b[real], atol=2e-5, rtol=2e-5)


def test_fewer_heads_of_keys_are_refused():
    module = torch.nn.Module()
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    with pytest.raises(NotImplementedError, match="key must have the sequences and heads of the query"):
        electra_fast.hf.attention(module, q, k, k, None)


def test_only_the_registry_changes():
    model = ElectraForPreTraining(ElectraConfig(**SIZES))
    assert model.config._attn_implementation == "sdpa"
    assert "electra_fast" in transformers.AttentionInterface()
