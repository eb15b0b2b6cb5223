"""From an example to token ids and labels: what is learnt is the completion and the end of sequence, no more.

Prompt and completion are encoded apart and their ids joined, so the boundary between them is the same in
training, where both are known, and in evaluation, where the completion is still to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flylora.errors import UserError
from flylora.tasks.base import Example

IGNORED = -100
"""The label that PyTorch's cross-entropy leaves out."""


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of one example, of equal length; labels are ``IGNORED`` on the prompt."""

    input_ids: list[int]
    labels: list[int]


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


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> list[int]:
    """The ids a completion follows: with the tokenizer's own beginning-of-sequence token, if it adds one.

    Args:
        prompt: The prompt of an example.
        tokenizer: The model's tokenizer.
        chat_template: Whether the prompt becomes a user's turn, followed by the opening of the assistant's.

    Raises:
        UserError: A chat template is asked for and the tokenizer has none.
    """
    if chat_template:
        return _ids(_render_chat(tokenizer, [{"role": "user", "content": prompt}], True), tokenizer)
    bare = _ids(prompt, tokenizer)
    full = list(tokenizer(prompt)["input_ids"])
    # What the tokenizer adds in front (a beginning of sequence) stays; what it adds behind (an end) must not.
    added = next((i for i in range(len(full) - len(bare) + 1) if bare and full[i : i + len(bare)] == bare), 0)
    return [*full[:added], *bare]


def encode_completion(completion: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a completion, without any special token."""
    return _ids(completion, tokenizer)


def end_token_id(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> int:
    """The id that ends a completion: the end of the assistant's turn, or the end of sequence.

    Raises:
        UserError: The tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has no end-of-sequence token, so the model could not learn to stop: set its eos_token."
        )
    eos = int(tokenizer.eos_token_id)
    if not chat_template:
        return eos
    mark = "flylora-turn"
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": mark}]
    closing = _ids(_render_chat(tokenizer, turns, False).rpartition(mark)[2], tokenizer)
    special = set(tokenizer.all_special_ids)
    return next((token for token in closing if token in special), eos)


def fit_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, room: int, chat_template: bool = False
) -> list[int] | None:
    """The ids of a prompt that loses its beginning until it takes ``room`` tokens or less; ``None`` if it cannot."""
    ids = encode_prompt(prompt, tokenizer, chat_template)
    bare = _ids(prompt, tokenizer)
    first = max(len(ids) - room, 0)
    while len(ids) > room and first < len(bare):
        ids = encode_prompt(tokenizer.decode(bare[first:]), tokenizer, chat_template)
        first += max(len(ids) - room, 1)
    return ids if len(ids) <= room else None


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
    prompt = encode_prompt(example.prompt, tokenizer, chat_template)
    learnt = [*encode_completion(example.completion, tokenizer), end_token_id(tokenizer, chat_template)]
    if truncate_prompt:
        fitted = fit_prompt(example.prompt, tokenizer, max_length - len(learnt), chat_template)
        prompt = prompt if fitted is None else fitted
    if len(prompt) + len(learnt) > max_length:
        return None
    return Encoded([*prompt, *learnt], [*[IGNORED] * len(prompt), *learnt])


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


@dataclass(frozen=True)
class CompletionCollator:
    """Pads a batch on the right.

    The padding id is only a placeholder: masks and labels come from the lengths, so it may equal the
    end-of-sequence id, and a tokenizer without one needs nothing set.
    """

    pad_id: int = 0

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Ids and labels -> ``input_ids``, ``labels`` and ``attention_mask``, each (batch, longest), int64."""
        lengths = [len(item["input_ids"]) for item in batch]
        shape = (len(lengths), max(lengths))
        out = {
            "input_ids": torch.full(shape, self.pad_id),
            "labels": torch.full(shape, IGNORED),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for row, (item, length) in enumerate(zip(batch, lengths, strict=True)):
            out["input_ids"][row, :length] = torch.as_tensor(item["input_ids"])
            out["labels"][row, :length] = torch.as_tensor(item["labels"])
            out["attention_mask"][row, :length] = 1
        return out


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render_chat(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], open_turn: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "The tokenizer has no chat template: leave chat_template out, or set one on the tokenizer."
        )
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_turn))
