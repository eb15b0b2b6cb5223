"""From an example to token ids and labels: what is learnt is the completion and the end of sequence, no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from flylora.errors import UserError
from flylora.lab.tasks.base import Example
from flylora.texts import IGNORED, Encoded, collate, encode_pair


@dataclass(frozen=True)
class EncodedSet:
    """Encoded examples, and what became of the others.

    Attributes:
        items: What fits, in the order of the examples.
        dropped: How many did not fit.
        trained_tokens: Labels that count, over all items, end-of-sequence tokens included.
        dropped_ids: The ids of the examples that did not fit.
    """

    items: list[Encoded]
    dropped: int
    trained_tokens: int
    dropped_ids: list[str]


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool = False,
    truncate_prompt: bool = False,
) -> Encoded | None:
    """One example as ids and labels; ``None`` if it cannot fit in ``max_length`` tokens.

    The completion and the token that ends it are never cut.
    """
    return encode_pair(example.prompt, example.completion, tokenizer, max_length, chat_template, truncate_prompt)


def encode_all(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool = False,
    truncate_prompt: bool = False,
) -> EncodedSet:
    """Every example that fits, and the ids of those that do not.

    Raises:
        UserError: There is no example, none fits, or no completion has a token to learn.
    """
    examples = list(examples)
    if not examples:
        raise UserError("There are no examples to encode: give a split that holds some.")
    encoded = [encode(example, tokenizer, max_length, chat_template, truncate_prompt) for example in examples]
    items = [item for item in encoded if item is not None]
    dropped = [example.id for example, item in zip(examples, encoded, strict=True) if item is None]
    if not items:
        raise UserError(
            f"None of the {len(examples)} examples fits in {max_length} tokens: raise max_length or shorten them."
        )
    trained = sum(label != IGNORED for item in items for label in item.labels)
    if trained == len(items):
        raise UserError(
            "Nothing is left to learn, every label is masked: the completions are empty, so check the template "
            "and the columns they are made from."
        )
    return EncodedSet(items, len(dropped), trained, dropped)


def sorted_micro_batches(batches: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The rows of some padded batches, dealt out again longest first, so that rows of like length share a batch.

    Args:
        batches: Each as ``collate`` gives it: tensors (rows, longest), padded on the right.

    Returns:
        As many batches of the same sizes with the same rows, each padded only to its own longest row. A loss that is
        summed over all of them is the same, for less padding to compute. A single batch stays as it is.
    """
    if len(batches) < 2:
        return [dict(batch) for batch in batches]
    rows = [
        {name: batch[name][row, :length] for name in ("input_ids", "labels")}
        for batch in batches
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist())
    ]
    longest_first = iter(sorted(rows, key=lambda row: -len(row["labels"])))
    dealt = [collate([next(longest_first) for _ in batch["labels"]]) for batch in batches]
    return [{name: tensor.to(batches[0]["labels"].device) for name, tensor in batch.items()} for batch in dealt]
