"""Log-likelihoods in batches against one row at a time, literally."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from conftest import make_model
from flylora.lab.labelled import token_log_likelihoods
from flylora.lab.training.methods import attach, method_config
from flylora.texts import IGNORED, Encoded


def row(prompt: int, completion: int, seed: int) -> Encoded:
    ids = torch.randint(5, 250, (prompt + completion,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(ids, [IGNORED] * prompt + ids[prompt:])


ROWS = [row(7, 2, 0), row(1, 5, 1), row(30, 1, 2), row(12, 12, 3), row(2, 1, 4)]


def one_at_a_time(model: PreTrainedModel, encoded: Encoded) -> list[float]:
    found = []
    for at, label in enumerate(encoded.labels):
        if label != IGNORED:
            with torch.no_grad():
                logits = model(torch.tensor([encoded.input_ids[:at]])).logits[0, -1].double()
            found.append(float(logits.log_softmax(-1)[label]))
    return found


def without_logits_to_keep() -> PreTrainedModel:
    """A model whose forward cannot be told which logits to compute."""
    model = make_model()
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None, use_cache=None: forward(  # type: ignore[method-assign]
        input_ids=input_ids, attention_mask=attention_mask
    )
    return model


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


@pytest.mark.parametrize("make", [make_model, without_logits_to_keep, gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batching_and_padding_change_nothing(make: object, batch_size: int) -> None:
    model = make()  # type: ignore[operator]
    done: list[int] = []
    found = token_log_likelihoods(model, ROWS, batch_size, done.append)
    for encoded, likelihoods in zip(ROWS, found, strict=True):
        assert likelihoods == pytest.approx(one_at_a_time(model, encoded), abs=1e-4)
    assert sum(done) == len(ROWS)


def test_virtual_tokens_of_prompt_methods_are_not_scored() -> None:
    adapted = attach(make_model(), method_config("prompt_tuning", {"num_virtual_tokens": 3}), seed=0).eval()
    found = token_log_likelihoods(adapted, ROWS, 2)
    assert [len(likelihoods) for likelihoods in found] == [2, 5, 1, 12, 1]
    one = [token_log_likelihoods(adapted, [encoded], 1)[0] for encoded in ROWS]
    for batched, single in zip(found, one, strict=True):
        assert batched == pytest.approx(single, abs=1e-4)
    assert found[0] != pytest.approx(one_at_a_time(make_model(), ROWS[0]), abs=1e-4)


def test_no_rows_give_no_numbers() -> None:
    assert token_log_likelihoods(make_model(), [], 4) == []
