"""Log-likelihoods of given completions, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from flylora.adapted import base_of
from flylora.lab.labelled import labelled_logits
from flylora.texts import Encoded, batches


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
    likelihoods: list[list[float]] = [[] for _ in rows]
    for chosen, batch in batches(rows, batch_size, base.device):
        logits, targets, counts = labelled_logits(model, **batch)
        losses = cross_entropy(logits, targets, reduction="none")
        for i, loss in zip(chosen, losses.cpu().split(counts.tolist()), strict=True):
            likelihoods[i] = (-loss.double()).tolist()
        advance(len(chosen))
    return likelihoods
