"""Greedy generation in batches against one prompt at a time, literally."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_model
from flylora.evaluation.generation import generate_greedily

PROMPTS = [[10, 20, 30], [40] * 9, [50, 60], list(range(100, 120)), [7]]


def literally(model: PreTrainedModel, prompt: list[int], count: int, ends: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batching_and_padding_change_nothing(tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    model = make_model()
    done: list[int] = []
    texts = generate_greedily(
        model, tokenizer, PROMPTS, batch_size=batch_size, max_new_tokens=6, end_ids=[2], advance=done.append
    )
    assert texts == [tokenizer.decode(literally(model, prompt, 6, [2])) for prompt in PROMPTS]
    assert sum(done) == len(PROMPTS)


def test_any_end_token_ends_and_is_not_part_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    endless = literally(model, PROMPTS[0], 6, [])
    end = endless[3]
    expected = endless[: endless.index(end)]
    texts = generate_greedily(model, tokenizer, PROMPTS[:1], batch_size=4, max_new_tokens=6, end_ids=[2, end])
    assert texts == [tokenizer.decode(expected)]


def test_a_stop_string_ends_early_and_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    endless = literally(model, PROMPTS[1], 12, [])
    stop = tokenizer.decode(endless[2:4])
    calls = []
    model.register_forward_hook(lambda *arguments: calls.append(1))
    texts = generate_greedily(model, tokenizer, PROMPTS[1:2], batch_size=1, max_new_tokens=12, end_ids=[2], stop=[stop])
    first = next(n for n in range(1, 13) if stop in tokenizer.decode(endless[:n]))
    assert texts == [tokenizer.decode(endless[:first])]
    assert len(calls) == first


def test_sampling_settings_of_the_model_are_ignored(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    expected = [tokenizer.decode(literally(model, prompt, 6, [2])) for prompt in PROMPTS]
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=50, repetition_penalty=9.0)
    texts = generate_greedily(model, tokenizer, PROMPTS, batch_size=2, max_new_tokens=6, end_ids=[2])
    assert texts == expected
    assert model.generation_config.repetition_penalty == 9.0
