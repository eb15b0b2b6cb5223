"""The command line: parses, calls one function, shows what it returned.

Options come from the typed config of each command, on the command line or from a YAML file given with --config. Only
what a command needs is imported, and only when it runs, so that help appears at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from flylora import __version__
from flylora.errors import UserError
from flylora.lab.evaluation.config import EvalConfig
from flylora.lab.examples import PreviewOptions
from flylora.lab.exporting.config import ExportConfig
from flylora.lab.merging.config import CalibrateConfig, MergeConfig
from flylora.lab.study.config import DemoOptions, StudyOptions
from flylora.lab.training.config import TrainConfig
from flylora.lab.training.interrupt import TrainingInterrupted

EXIT_CELLS_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class InspectConfig:
    """What to inspect.

    Args:
        adapter: Folder of a saved FlyLoRA adapter.
    """

    adapter: str


def _train(config: TrainConfig) -> None:
    from flylora.lab.show import show_training
    from flylora.lab.training import train

    show_training(train(config))


def _eval(config: EvalConfig) -> None:
    if config.lm_eval is not None:
        from flylora.lab.evaluation import evaluate_with_harness
        from flylora.lab.evaluation.show import show_harness

        show_harness(evaluate_with_harness(config))
        return
    from flylora.lab.evaluation import evaluate
    from flylora.lab.show import show_evaluation

    show_evaluation(evaluate(config))


def _export(config: ExportConfig) -> None:
    from flylora.lab.exporting.run import export
    from flylora.lab.exporting.show import show_export

    show_export(export(config))


def _merge(config: MergeConfig) -> None:
    from flylora.lab.merging import merge_adapters
    from flylora.lab.merging.show import show_merge

    show_merge(merge_adapters(config))


def _calibrate(config: CalibrateConfig) -> None:
    from flylora.lab.merging import calibrate_adapters
    from flylora.lab.merging.show import show_calibration

    show_calibration(calibrate_adapters(config), config)


def _study(options: StudyOptions) -> int:
    from flylora.lab.study.run import run_study
    from flylora.lab.study.show import show_plan, show_study
    from flylora.lab.study.workload import plan_study

    if options.plan:
        show_plan(plan_study(options))
        return 0
    result = run_study(options)
    show_study(result)
    return EXIT_CELLS_FAILED if result.failed else 0


def _demo(options: DemoOptions) -> int:
    from flylora.lab.demo import run_demo
    from flylora.lab.study.show import show_study

    result = run_demo(options)
    show_study(result)
    return EXIT_CELLS_FAILED if result.failed else 0


def _preview(config: PreviewOptions) -> None:
    from rich import print as show

    from flylora.lab.examples import preview
    from flylora.lab.show import preview_panels

    show(preview_panels(preview(config)))


def _inspect(config: InspectConfig) -> None:
    from rich import print as show

    from flylora.inspection import inspect_adapter, render

    show(render(inspect_adapter(config.adapter)))


@dataclass(frozen=True)
class _Command:
    """One subcommand: its config class, the function that takes such a config, and a line of help."""

    config: type[Any]
    run: Callable[[Any], int | None]  # gives the exit code, 0 for none
    help: str
    positional: str | None = None  # its only field, if it is given without a name
    many: bool = False  # whether the positional field takes several values
    positional_help: str = "folder of a saved adapter"


COMMANDS = {
    "train": _Command(TrainConfig, _train, "train an adapter on a task"),
    "eval": _Command(EvalConfig, _eval, "evaluate a model, with or without an adapter, on a task"),
    "export": _Command(ExportConfig, _export, "write an adapter as a plain LoRA or as full weights", "adapter"),
    "merge": _Command(MergeConfig, _merge, "merge adapters into one", "adapters", many=True),
    "calibrate": _Command(
        CalibrateConfig, _calibrate, "gather what a least squares merge needs of a task", "adapters", many=True
    ),
    "study": _Command(
        StudyOptions,
        _study,
        "run a grid of models, methods, tasks and seeds, with merges, or plan it",
        "study",
        positional_help="the study's YAML file",
    ),
    "demo": _Command(DemoOptions, _demo, "train, evaluate and merge adapters on SmolLM2-135M, in about five minutes"),
    "preview": _Command(PreviewOptions, _preview, "print examples of a task with the trained tokens coloured"),
    "inspect": _Command(InspectConfig, _inspect, "show what a saved adapter is", positional="adapter"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 for success, 1 if cells of a study failed, 2 for bad input (one sentence on stderr), 130 after an
        interruption.
    """
    try:
        with warnings.catch_warnings():
            # Libraries announce to one another what they will rename; whoever runs a command can do nothing about it.
            warnings.simplefilter("ignore", FutureWarning)
            command, config = parse(sys.argv[1:] if argv is None else argv)
            with _terminated_like_interrupted():
                return command.run(config) or 0
    except (UserError, argparse.ArgumentError) as error:
        print(f"flylora: {_one_sentence(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except TrainingInterrupted as stop:
        print(f"flylora: {stop}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("flylora: Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C does, so that what is half written is removed then too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(argv: Sequence[str]) -> tuple[_Command, Any]:
    """The command that the arguments ask for, and its config.

    Raises:
        argparse.ArgumentError: The arguments are not what the command takes.
        UserError: They are, but their values cannot be meant.
    """
    parser = ArgumentParser(
        prog="flylora",
        description="FlyLoRA adapters: train, evaluate and inspect them on one's own tasks.",
        version=__version__,
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(required=True, dest="command", title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = ArgumentParser(description=f"{command.help.capitalize()}.", exit_on_error=False)
        subparser.add_argument("--config", action="config", help="YAML file with any of these options")
        if command.positional is not None:
            several: dict[str, Any] = {"nargs": "+"} if command.many else {}
            subparser.add_argument(command.positional, type=str, help=command.positional_help, **several)
        subparser.add_class_arguments(command.config, skip={command.positional} if command.positional else None)
        subcommands.add_subcommand(name, subparser, help=command.help)
    chosen = parser.parse_args(_as_jsonargparse_spells(list(argv)))
    command = COMMANDS[chosen["command"]]
    options = chosen[chosen["command"]].as_dict()
    return command, command.config(**{k: v for k, v in options.items() if k != "config"})


def _as_jsonargparse_spells(argv: list[str]) -> list[str]:
    """--max-length as --max_length, a bare --resume as --resume=true, and --evaluate a b as --evaluate=["a", "b"]."""
    command = COMMANDS.get(next((word for word in argv if not word.startswith("-")), ""))
    types = {f.name: str(f.type) for f in dataclasses.fields(command.config)} if command else {}
    spelled, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        option = re.match(r"--[\w.-]+", word)
        if option:
            name = option[0][2:].replace("-", "_")
            word = f"--{name}{word[option.end() :]}"
            kind = types.get(word[2:], "")
            if "bool" in kind and not (rest and rest[0] in ("true", "false", "null")):
                word += "=true"
            elif kind.startswith("list") and rest and not rest[0].startswith("[") and _is_value(rest[0]):
                values = []
                while rest and _is_value(rest[0]):
                    values.append(rest.pop(0))
                word += f"=[{', '.join(values)}]" if "float" in kind or "int" in kind else f"={json.dumps(values)}"
        spelled.append(word)
    return spelled


def _is_value(word: str) -> bool:
    """Whether a word is no option; a negative number is none."""
    return not word.startswith("-") or re.fullmatch(r"-[\d.]+(e-?\d+)?", word) is not None


def _one_sentence(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    text = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
    for said, better in (
        # The parser names an option by where it is kept (train.model); users know it as --model.
        (rf"\b(?:{'|'.join(COMMANDS)})\.(\w)", r"--\1"),
        (r'Parser key "([\w.]+)"', r"--\1"),
        (r"<class '(\w+)'>", r"\1"),
        (r"\. Got value: ", ", got "),
    ):
        text = re.sub(said, better, text)
    return f"{text[:1].upper()}{text[1:]} (flylora COMMAND --help lists what a command takes)."
