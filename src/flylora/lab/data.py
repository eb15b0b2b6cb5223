"""From an example to token ids and labels: what is learnt is the completion and the end of sequence, no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from flylora.errors import UserError
from flylora.lab.tasks.base import Example, Split, Task
from flylora.texts import IGNORED, Encoded, encode_pair


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
