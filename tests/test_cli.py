"""The command line: options, recipes, exit codes. What the commands do is tested with them and end to end."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstring_parser
import pytest

import flylora
from flylora import cli
from flylora.cli import COMMANDS, main, parse
from flylora.errors import UserError
from flylora.lab.evaluation import EvalConfig
from flylora.lab.training import TrainConfig
from flylora.lab.training.interrupt import TrainingInterrupted

TRAIN = ["train", "--model", "m", "--task", "t", "--out", "o"]


def config(*argv: str) -> Any:
    return parse(argv)[1]


def test_options_become_the_commands_config() -> None:
    assert config(*TRAIN) == TrainConfig(model="m", task="t", out="o")
    assert config("eval", "--model", "m", "--task=t") == EvalConfig(model="m", task="t")


def test_dashes_and_underscores_are_the_same() -> None:
    assert config(*TRAIN, "--max-length", "7").max_length == config(*TRAIN, "--max_length=7").max_length == 7
    assert config("train", "--model=a-b", "--task", "t", "--out", "o-p").model == "a-b"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "true"], True),
        (["--resume=false"], False),
        (["--resume", "false"], False),
    ],
)
def test_switches_need_no_value(words: list[str], expected: bool) -> None:
    assert config(*TRAIN, *words, "--lr", "1e-4").resume is expected


def test_a_switch_may_stand_last_or_before_another_option() -> None:
    assert config(*TRAIN, "--chat-template", "--steps", "3").chat_template is True
    assert config(*TRAIN, "--steps", "3", "--chat-template").chat_template is True
    assert config(*TRAIN, "--chat-template=null").chat_template is None


def test_method_options_keep_their_types() -> None:
    words = ["--adapter.r", "16", "--adapter.density", "0.5", "--adapter.target_modules", "[q_proj, v_proj]"]
    options = config(*TRAIN, *words, "--adapter.save-projection", "true").adapter
    assert options == {"r": 16, "density": 0.5, "target_modules": ["q_proj", "v_proj"], "save_projection": True}


def test_a_recipe_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ntask: t\nout: o\nlr: 1e-4\nadapter: {r: 16, k: 2}\nreport_to: [tensorboard]\n")
    found = config("train", "--config", str(recipe), "--adapter.k", "4", "--steps", "9")
    assert found == TrainConfig(
        model="m", task="t", out="o", lr=1e-4, adapter={"r": 16, "k": 4}, report_to=["tensorboard"], steps=9
    )


@pytest.mark.parametrize("command", [name for name, c in COMMANDS.items() if c.positional is None])
def test_every_option_can_come_from_a_recipe(command: str, tmp_path: Path) -> None:
    cls = COMMANDS[command].config
    required = {"model": "m", "task": "t", "out": "o"}
    values = {
        f.name: required.get(f.name, f.default)
        for f in dataclasses.fields(cls)
        if f.default is not dataclasses.MISSING or f.name in required
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "".join(
            f"{k}: {'null' if v is None else str(v).lower() if isinstance(v, bool) else v}\n" for k, v in values.items()
        )
    )
    assert config(command, "--config", str(recipe)) == cls(**values)


def test_help_describes_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        described = {parameter.arg_name for parameter in docstring_parser.parse(command.config.__doc__).params}
        for field in dataclasses.fields(command.config):
            assert field.name in described
            assert f"--{field.name} " in shown or field.name == command.positional


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom flylora.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy') if m in sys.modules])"
    )
    for words in (["--help"], ["train", "--help"], ["eval", "--nonsense"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", words


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert flylora.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "train"),
        (["fly"], "'fly'"),
        (["train", "--model", "m"], "--task"),
        ([*TRAIN, "--nonsense", "1"], "--nonsense"),
        ([*TRAIN, "--lr", "fast"], "fast"),
        ([*TRAIN, "--schedule", "steep"], "--schedule"),
        ([*TRAIN, "--adapter", "3"], "--adapter"),
        ([*TRAIN, "--steps", "0"], "steps must be above 0"),
        ([*TRAIN, "--config", "none.yaml"], "none.yaml"),
        (["inspect"], "adapter"),
        (["inspect", "/no/such/adapter"], "/no/such/adapter"),
        (["preview", "--model", "/no/such", "--task", "capitals"], "There is no model"),
        (["eval", "--model", "m", "--task", "nothing"], "Unknown task 'nothing'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("flylora: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["lr: fast\n", "speed: 3\n", "lr: [\n", "- lr\n"])
def test_a_bad_recipe_is_one_sentence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert main([*TRAIN, "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def raising(error: BaseException) -> Callable[[Any], None]:
    def run(config: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("Bad: do better."), 2, "flylora: Bad: do better.\n"),
        (TrainingInterrupted("Go on with --resume."), 130, "flylora: Go on with --resume.\n"),
        (KeyboardInterrupt(), 130, "flylora: Interrupted.\n"),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = dataclasses.replace(COMMANDS["train"], run=raising(error))
    monkeypatch.setitem(cli.COMMANDS, "train", command)
    assert main(TRAIN) == code
    assert capsys.readouterr().err == said


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "train", dataclasses.replace(COMMANDS["train"], run=raising(ZeroDivisionError())))
    with pytest.raises(ZeroDivisionError):
        main(TRAIN)


def test_preview_shows_examples(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["preview", "--model", str(tiny_model_dir), "--task", "arithmetic", "--n", "1", "--max-length", "200"])
        == 0
    )
    assert "Answer:" in capsys.readouterr().out


def test_termination_cleans_up_as_an_interruption_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "partial"

    def run(config: Any) -> None:
        partial.mkdir()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not terminated")
        finally:
            partial.rmdir()

    monkeypatch.setitem(COMMANDS, "inspect", dataclasses.replace(COMMANDS["inspect"], run=run))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["inspect", str(tmp_path)]) == 130
    assert not partial.exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "flylora: Interrupted.\n"
