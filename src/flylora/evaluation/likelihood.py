"""Log-likelihoods of given completions, in batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from flylora.data import IGNORED, CompletionCollator, Encoded
from flylora.evaluation.adapters import base_of


@torch.no_grad()
def token_log_likelihoods(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[Encoded],
    batch_size: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[list[float]]:
    """log p(token | everything before it), in nats, of every labelled token.

    Args:
        model: In evaluation mode.
        rows: Ids and labels; what is not labelled is read, not scored.
        batch_size: Rows per forward pass. Rows of like length share a batch, padded on the right under a mask.
        advance: Called with the number of rows done, for progress.

    Returns:
        For each row, in the order given, one number for each label that is not ``IGNORED``.
    """
    base = base_of(model)
    may_skip = "logits_to_keep" in inspect.signature(base.forward).parameters
    collate = CompletionCollator()
    found: list[list[float]] = [[] for _ in rows]
    # Longest first, so that a batch too large for memory fails at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {key: value.to(base.device) for key, value in collate([vars(rows[i]) for i in chosen]).items()}
        targets = batch.pop("labels")[:, 1:]
        # The last logits predict nothing. Prompts before the first label need none either.
        first = int((targets != IGNORED).any(0).int().argmax())
        keep = targets.shape[1] - first + 1
        logits = model(**batch, use_cache=False, **({"logits_to_keep": keep} if may_skip else {})).logits
        targets = targets[:, first:]
        scored = targets != IGNORED
        # Only what is scored is made float32 and normalised: over a large vocabulary the rest would fill the memory.
        losses = cross_entropy(logits[:, -keep:-1][scored].float(), targets[scored], reduction="none")
        for i, loss in zip(chosen, losses.cpu().split(scored.sum(1).tolist()), strict=True):
            found[i] = (-loss.double()).tolist()
        advance(len(chosen))
    return found
