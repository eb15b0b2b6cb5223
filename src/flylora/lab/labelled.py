"""The logits that labels are compared with, and no others: over a large vocabulary the rest costs the most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from flylora.texts import IGNORED


def labelled_logits(
    model: PreTrainedModel | PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a causal language model says of every labelled token, from all that stands before it.

    Args:
        model: With or without an adapter.
        input_ids: (batch, length), padded on the right.
        attention_mask: (batch, length), 0 on padding.
        labels: (batch, length), ``IGNORED`` where nothing is asked.

    Returns:
        Logits (n, vocabulary) in float32 and the n labels they are for, row by row, and how many each row has (batch,).
    """
    asked = labels[:, 1:] != IGNORED
    with _head_reads(model, asked):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return logits[0].float(), labels[:, 1:][asked], asked.sum(1)


@contextmanager
def _head_reads(model: PreTrainedModel | PeftModel, asked: torch.Tensor) -> Iterator[None]:
    """While open, the head of the model gets the hidden states of some positions alone, as a batch of one row.

    Args:
        model: Its output embedding takes hidden states (batch, length, width).
        asked: (batch, length - 1), true where the next token is asked for.
    """

    def select(head: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = args
        # Prompt methods put virtual tokens before the first.
        # A model over several devices may have its head on another one than its inputs.
        return hidden[:, -asked.shape[1] - 1 : -1][asked.to(hidden.device)].unsqueeze(0), *others

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
