"""The logits that labels are compared with, and no others: over a large vocabulary the rest costs the most."""

from __future__ import annotations

import inspect

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from flylora.data import IGNORED


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
    targets = labels[:, 1:]
    # The last logits predict nothing. Prompts before the first label need none either.
    first = int((targets != IGNORED).any(0).int().argmax())
    keep = targets.shape[1] - first + 1
    short = {"logits_to_keep": keep} if _may_skip(model) else {}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **short).logits
    targets = targets[:, first:]
    asked = targets != IGNORED
    return logits[:, -keep:-1][asked].float(), targets[asked], asked.sum(1)


def _may_skip(model: PreTrainedModel | PeftModel) -> bool:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
