"""Greedy generation in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from flylora.evaluation.adapters import base_of


class _StopAt(StoppingCriteria):
    """Ends a row once its new text holds one of the stop strings."""

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def generate_greedily(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    stop: Sequence[str] = (),
    advance: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """The most likely continuation of every prompt, token by token.

    Args:
        model: In evaluation mode.
        tokenizer: To turn ids into text.
        prompts: Token ids. Prompts of like length share a batch, padded on the left under a mask.
        batch_size: Prompts per batch.
        max_new_tokens: Longest continuation in tokens.
        end_ids: Any of these ids ends a continuation and is not part of its text.
        stop: Any of these strings ends it too; text from the string on is left in.
        advance: Called with the number of prompts done, for progress.

    Returns:
        The continuations as text, in the order of the prompts.
    """
    device = base_of(model).device
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],  # only a placeholder under the mask
    )
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), end_ids[0])
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        stopping = StoppingCriteriaList([_StopAt(stop, tokenizer, width)] if stop else [])
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            stopping_criteria=stopping,
        )
        for i, row_ids in zip(chosen, out[:, width:].tolist(), strict=True):
            end = next((at for at, token in enumerate(row_ids) if token in end_ids), len(row_ids))
            texts[i] = tokenizer.decode(row_ids[:end], skip_special_tokens=True)
        advance(len(chosen))
    return texts
