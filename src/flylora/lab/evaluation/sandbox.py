"""Generated programs, run where they can do no harm, and judged where they cannot cheat.

What is guaranteed, and what is not, is said in docs/domains.md. A machine that cannot give the guarantees is refused:
there is no weaker mode.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flylora.errors import UserError
from flylora.lab.evaluation import inside

# What an interpreter needs to start and to import its standard library, on the usual and the less usual systems.
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

_LAUNCHER = str(Path(__file__).with_name("isolate.py"))
_TIME_IS_UP = 124  # its exit code then

_GRACE = 10.0  # seconds to start interpreters and to clear up, beyond the limit of the program


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        wall_seconds: Of time, for the program and its tests together.
        cpu_seconds: Of processor time, each process.
        memory_bytes: Of address space, each process.
        file_bytes: In one file.
        home_bytes: In its temporary home, which is in memory.
        processes: At once, threads included.
        open_files: Each process.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20
    home_bytes: int = 16 << 20
    processes: int = 8
    open_files: int = 64


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests, and if not why, in the program's own words or ours."""

    passed: bool
    reason: str


def run_tests(program: str, entry_point: str, test: str, given: str = "", limits: Limits | None = None) -> Verdict:
    """Runs a program's function against tests, both isolated from the machine and from one another.

    Arguments and results travel between them as plain data (numbers, text, bytes, lists, tuples, sets, dicts, ranges,
    iterators); a result of another class fails. A change that the function makes to its arguments is not seen.

    Args:
        program: Source of the program.
        entry_point: Name of the function it must define.
        test: Source that defines ``check(candidate)``, which raises unless the function is right.
        given: Source of what the tests may use besides; the tests' own process runs it.
        limits: Of each of the two processes; the default ones if left out.

    Raises:
        UserError: This machine cannot isolate a program.
    """
    limits = limits or Limits()
    with ExitStack() as stack:
        calls, answers, verdict = pipes = [_Pipe(stack) for _ in range(3)]
        task = {"program": program, "entry_point": entry_point}
        program_side = stack.enter_context(_isolated("program", task, (calls.reading, answers.writing), limits))
        task = {"given": given, "entry_point": entry_point, "test": test}
        ends = (answers.reading, calls.writing, verdict.writing)
        judge_side = stack.enter_context(_isolated("judge", task, ends, limits))
        for pipe in pipes:
            pipe.close_writing()
        calls.close_reading()
        answers.close_reading()
        _wait(judge_side, limits.wall_seconds)
        said = os.read(verdict.reading, 1 << 12)
        out_of_time = _TIME_IS_UP in (judge_side.poll(), program_side.poll())
    passed, reason = json.loads(said) if said else (False, "the tests ended without a verdict")
    if out_of_time and not passed:
        reason = f"not done within {limits.wall_seconds:g} s"
    return Verdict(passed, reason)


@cache
def check_isolation() -> None:
    """Raises a ``UserError`` if this machine cannot isolate a program; found out by a harmless one."""
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    # A machine under load may be slow to start four interpreters.
    found = run_tests("def probe(x):\n    return x + 1\n", "probe", test, limits=Limits(wall_seconds=60.0))
    if not found.passed:
        raise _cannot(found.reason)


def _cannot(reason: str) -> UserError:
    return UserError(
        f"Generated programs cannot be run safely on this machine ({reason}): it takes Linux 5.12 or newer that allows "
        "user namespaces, or root with the right to mount."
    )


class _Pipe:
    """Both ends, closed at the latest with ``stack``; no child gets one that is not passed to it."""

    def __init__(self, stack: ExitStack) -> None:
        self.reading, self.writing = os.pipe()
        self._open = {self.reading, self.writing}
        stack.callback(self.close_reading)
        stack.callback(self.close_writing)

    def close_reading(self) -> None:
        self._close(self.reading)

    def close_writing(self) -> None:
        self._close(self.writing)

    def _close(self, end: int) -> None:
        if end in self._open:
            self._open.remove(end)
            os.close(end)


@contextmanager
def _isolated(
    role: str, task: dict[str, str], ends: Sequence[int], limits: Limits
) -> Iterator[subprocess.Popen[bytes]]:
    """A role of ``inside.py`` as a process of its own, which nothing is left of at the end."""
    if sys.platform != "linux":
        raise _cannot(f"it runs {sys.platform}")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="flylora-"))
        stdin, complaints = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        stdin.write(json.dumps(task).encode())
        stdin.seek(0)
        python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        settings = {
            **dataclasses.asdict(limits),
            "core_bytes": 0,
            "time_is_up": _TIME_IS_UP,
            "root": folder,
            "visible": _visible(),
            "user": _unused_user() if os.geteuid() == 0 else None,
            "command": [python, "-I", "-S", "-c", _inside(), role, *map(str, ends)],
        }
        process = subprocess.Popen(
            [python, "-I", "-S", _LAUNCHER, json.dumps(settings)],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            env={},
            pass_fds=ends,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            _wait(process, 0.0)
        complaints.seek(0)
        said = complaints.read(1 << 10).decode(errors="replace").strip()
        if said:
            raise _cannot(said.splitlines()[-1].rstrip("."))  # the last line of a traceback is the one that tells


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the launcher has ended, as it does by itself when time is up; a launcher that hangs is killed."""
    try:
        process.wait(seconds + _GRACE)
    except subprocess.TimeoutExpired:
        process.kill()  # which ends what it started, too
        process.wait()


@cache
def _inside() -> str:
    return Path(inside.__file__).read_text(encoding="utf-8")


@cache
def _visible() -> list[str]:
    """The files and folders that the sandbox shows, read-only: no home, no configuration, no other process."""
    wanted = [*_SYSTEM, os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix), *_DEVICES]
    found: list[str] = []
    for path in wanted:
        if Path(path).exists() and not any(Path(path).is_relative_to(shown) for shown in found):
            found.append(path)
    return found


def _unused_user() -> int:
    """The id of a user that does not exist, another one each time, so that processes are counted apart."""
    import pwd  # not on every platform

    while True:
        number = 50_000 + secrets.randbelow(10_000)
        try:
            pwd.getpwuid(number)
        except KeyError:
            return number
