"""The prompts of the published tasks, each a pure function named in ``PROMPTS`` with its version.

``Task.prompt`` states the name. A prompt is never changed: a better one is a new function under a new name, and the
tasks that take it get a new version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def question(text: str) -> str:
    """``question-v1``: the question, and a line for the answer that the completion goes on with."""
    return f"Question: {text}\nAnswer:"


def lettered(text: str, options: Sequence[str], context: str = "", subject: str = "") -> str:
    """``lettered-v1``: a multiple-choice question whose options have letters, to be answered by one of them."""
    parts = [f"Subject: {subject}" if subject else "", f"Context: {context}" if context else "", f"Question: {text}"]
    listed = [f"{letter(number)}. {option}" for number, option in enumerate(options)]
    return "\n".join([*filter(None, parts), *listed, "Answer:"])


def instruction(text: str, given: str = "") -> str:
    """``instruction-v1``: headings for the instruction, for what it is about if anything, and for the response."""
    about = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{text}\n\n{about}### Response:\n"


def numbered_instruction(text: str, options: Sequence[str], context: str = "") -> str:
    """``numbered-instruction-v1``: a multiple-choice question as an instruction, to be answered by a number from 0."""
    listed = [f"{number}: {option}" for number, option in enumerate(options)]
    ask = "Answer the question with the number of the right option."
    return instruction(ask, "\n".join([*filter(None, [context]), text, *listed]))


def function_instruction(code: str) -> str:
    """``function-instruction-v1``: the beginning of a Python function as an instruction to complete it."""
    return instruction("Complete the Python function below and write it out in full.", code.strip())


def code(text: str) -> str:
    """``code-v1``: the beginning of a program, to be gone on with.

    Without the white space at its end: tokens that begin with a newline and the indentation are what models know.
    """
    return text.rstrip()


def letter(number: int) -> str:
    """The letter of an option: A for 0, B for 1, ..."""
    return chr(ord("A") + number)


PROMPTS: dict[str, Callable[..., str]] = {
    "question-v1": question,
    "lettered-v1": lettered,
    "instruction-v1": instruction,
    "numbered-instruction-v1": numbered_instruction,
    "function-instruction-v1": function_instruction,
    "code-v1": code,
}
"""Name and version of a prompt -> the function that writes it."""
