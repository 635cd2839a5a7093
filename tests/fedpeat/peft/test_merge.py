import torch

from fedpeat.peft import merged_model


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def moved(tuned):
    tuned.write({name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tuned.read().items()})
    return tuned


def test_a_bf16_model_stays_bf16(full, attached, make_ids):
    for method in ({"kind": "lora", "rank": 2}, {"kind": "full"}):
        tuned = moved(attached(full(dtype="bfloat16"), **method))
        plain = merged_model(tuned)
        assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in plain.parameters())
        torch.testing.assert_close(logits(plain, make_ids()), logits(tuned.model, make_ids()), atol=0.2, rtol=0.2)


def test_the_tuned_model_stays_as_it_is(full, attached, make_ids):
    tuned = moved(attached(full(), kind="lora", rank=2))
    before, tensors = logits(tuned.model, make_ids()), tuned.read()
    plain = merged_model(tuned)
    assert torch.equal(logits(tuned.model, make_ids()), before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in tuned.read().items())
    with torch.no_grad():
        next(plain.parameters()).zero_()
    assert torch.equal(logits(tuned.model, make_ids()), before)


def test_a_prompt_cannot_be_folded(full, attached):
    options = {"num_virtual_tokens": 3}
    assert merged_model(attached(full(), kind="hf", type="PROMPT_TUNING", options=options)) is None


def test_a_head_that_trained_is_in_the_copy(full, attached):
    tuned = moved(attached(full(), kind="lora", rank=2, train_head=True))
    assert torch.equal(merged_model(tuned).lm_head.weight, tuned.read()["lm_head.weight"])
