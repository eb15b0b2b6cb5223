"""The launcher's own checks: it starts nothing that it has not seen to be cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("the sandbox is for Linux", allow_module_level=True)

import resource

from flylora.lab.evaluation import isolate


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings that a pretended sandbox fulfils; nothing is limited or signalled here."""

    def nobody(number: int, signal: int) -> None:
        assert (number, signal) == (-1, 0)
        raise ProcessLookupError

    monkeypatch.setattr(os, "getresuid", lambda: (9, 9, 9))
    monkeypatch.setattr(os, "getresgid", lambda: (9, 9, 9))
    monkeypatch.setattr(os, "kill", nobody)
    monkeypatch.setattr(os, "listdir", lambda path: ["usr", "sandbox"])
    monkeypatch.setattr(resource, "getrlimit", lambda number: (7, 7))
    return {**dict.fromkeys(isolate._LIMITS, 7), "visible": ["/usr"], "user": None}


def test_what_is_cut_off_is_let_through(settings: dict[str, Any]) -> None:
    isolate._verify(settings)


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        ("getresuid", lambda: (9, 9, 0), "still be root"),
        ("getresgid", lambda: (0, 9, 9), "still be root"),
        ("kill", lambda *_: None, "still signal other processes"),
        ("listdir", lambda path: ["usr", "sandbox", "home"], "still see the machine's files"),
    ],
)
def test_what_is_not_cut_off_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, found: Any, said: str
) -> None:
    monkeypatch.setattr(os, name, found)
    with pytest.raises(RuntimeError, match=said):
        isolate._verify(settings)


@pytest.mark.parametrize("name", isolate._LIMITS)
def test_a_limit_that_does_not_hold_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(RuntimeError, match=f"the limit of {name} does not hold"):
        isolate._verify({**settings, name: 8})


def test_it_needs_nothing_but_the_standard_library() -> None:
    for name in ("isolate", "inside"):
        command = [sys.executable, "-I", "-S", "-c", f"import runpy; runpy.run_path({isolate.__file__!r})"]
        command[-1] = command[-1].replace("isolate.py", f"{name}.py")
        assert subprocess.run(command, capture_output=True, env={}, check=False).returncode == 0


TWO_REQUESTS = """
import os, signal
from flylora.lab.evaluation import isolate
both = {signal.SIGALRM, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, both)
isolate._stop_after(99)
for number in both:
    os.kill(os.getpid(), number)
try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
except isolate.TimeIsUp:
    print("time is up")
"""


def test_two_requests_at_once_to_stop_are_one_and_bring_no_complaint() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_REQUESTS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "time is up\n", "")
