"""From an example to token ids and labels: what is learnt is the completion and the end of sequence, no more.

Prompt and completion are encoded apart and their ids joined, so the boundary between them is the same in
training, where both are known, and in evaluation, where the completion is still to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from flylora.errors import UserError
from flylora.lab.tasks.base import Example, Split, Task

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

    An empty prompt is that token alone, if there is one, so that the first token of the completion can be learnt.

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
    if not bare:
        return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    full = list(tokenizer(prompt)["input_ids"])
    # What the tokenizer adds in front (a beginning of sequence) stays; what it adds behind (an end) must not.
    added = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    return [*full[:added], *bare]


def encode_completion(completion: str, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> list[int]:
    """The ids of a completion, without any special token.

    The one space that sets a completion off from a plain prompt is left out where a chat template opens the turn.
    """
    return _ids(completion.removeprefix(" ") if chat_template else completion, tokenizer)


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
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
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
    learnt = [*encode_completion(example.completion, tokenizer, chat_template), end_token_id(tokenizer, chat_template)]
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


def sorted_micro_batches(batches: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The rows of some padded batches, dealt out again longest first, so that rows of like length share a batch.

    Args:
        batches: Each as ``CompletionCollator`` gives it: tensors (rows, longest), padded on the right.

    Returns:
        As many batches of the same sizes with the same rows, each padded only to its own longest row. A loss that is
        summed over all of them is the same, for less padding to compute. A single batch stays as it is.
    """
    if len(batches) < 2:
        return [dict(batch) for batch in batches]
    rows = [
        {name: value[row] for name, value in batch.items()} for batch in batches for row in range(len(batch["labels"]))
    ]
    lengths = [length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]
    order = iter(sorted(range(len(rows)), key=lambda row: -lengths[row]))
    found = []
    for batch in batches:
        chosen = [next(order) for _ in batch["labels"]]
        longest = lengths[chosen[0]]
        found.append(
            {
                name: pad_sequence(
                    [rows[i][name][:longest] for i in chosen],
                    batch_first=True,
                    padding_value=IGNORED if name == "labels" else 0,
                )
                for name in batch
            }
        )
    return found


def render_preview(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    n: int = 3,
    split: Split = "train",
    chat_template: bool | None = None,
    max_length: int | None = None,
) -> RenderableType:
    """A few examples as a model is trained on them, the trained tokens in colour, and token counts of the whole split.

    Neighbouring trained tokens differ in shade, so that their boundaries can be seen.

    Args:
        task: The task.
        tokenizer: The model's tokenizer.
        n: How many examples, drawn as ``Task.examples`` draws them.
        split: Which split.
        chat_template: Whether prompts go through the chat template; the task's own choice if left out.
        max_length: In tokens; the task's own if left out.

    Returns:
        Something for ``rich.print``.
    """
    chat = task.chat_template if chat_template is None else chat_template
    length = max_length or task.max_length
    panels: list[RenderableType] = []
    for example in task.examples(split, n):
        encoded = encode(example, tokenizer, length, chat, task.truncate_prompt)
        panels.append(_panel(example, encoded, tokenizer, length))
    found = encode_all(task.examples(split), tokenizer, length, chat, task.truncate_prompt)
    sizes = [len(item.input_ids) for item in found.items]
    summary = Text(
        f"{task.name} {task.version}, {split}: {len(sizes)} examples, {sum(sizes)} tokens "
        f"({sum(sizes) / len(sizes):.1f} each, at most {max(sizes)}), {found.trained_tokens} of them trained"
    )
    if found.dropped:
        shown = ", ".join(found.dropped_ids[:5]) + (", …" if found.dropped > 5 else "")
        summary.append(f"\n{found.dropped} do not fit in {length} tokens and are dropped: {shown}", style="red")
    return Group(*panels, summary)


def _panel(
    example: Example, encoded: Encoded | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> RenderableType:
    if encoded is None:
        return Panel(Text(f"does not fit in {max_length} tokens", style="red"), title=Text(example.id))
    body = Text()
    trained = [label != IGNORED for label in encoded.labels]
    body.append(tokenizer.decode(encoded.input_ids[: trained.index(True)]), style="dim")
    shades = ("bold black on green", "bold black on bright_green")
    for number, piece in enumerate(_pieces(encoded.input_ids[trained.index(True) :], tokenizer)):
        body.append(piece, style=shades[number % 2])
    counts = f"{len(trained)} tokens, {sum(trained)} trained"
    return Panel(body, title=Text(example.id), subtitle=counts, title_align="left", subtitle_align="right")


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text of each token; tokens that share a character are one piece."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text
            waiting = []
    if waiting:
        yield tokenizer.decode(waiting)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render_chat(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], open_turn: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("The tokenizer has no chat template: leave chat_template out, or set one on the tokenizer.")
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_turn))
