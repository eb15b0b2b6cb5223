"""Runs one command cut off from the machine: a script for an interpreter of its own, which needs nothing of flylora.

``sandbox.py`` starts it as ``python -I -S isolate.py SETTINGS``. Three processes do the work:

- the launcher enters new namespaces (processes, mounts, network, IPC, host name; of users too unless it is root) and
  ends everything when time is up;
- the first process of the new process namespace, which it starts, builds a root folder of read-only system files and
  an empty temporary home, and waits: when it ends, the kernel kills whatever is left in the namespace;
- the command, started from there under resource limits, as a user without any privilege.

The command is started only after it has been verified that it is cut off and that the limits hold. Whatever goes
wrong before that is told on stderr, which the command itself never has.
"""

# pathlib takes longer to import than everything else here together.
# ruff: noqa: PTH103, PTH112, PTH116, PTH120, PTH123, PTH208

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

HOME = "/sandbox"
"""The home, working and temporary folder, as the command sees it."""

INNER_ID = 65534  # nobody, as the user is called inside a user namespace

_CLONE = {"mnt": 0x00020000, "uts": 0x04000000, "ipc": 0x08000000, "pid": 0x20000000, "net": 0x40000000}
_CLONE_NEWUSER = 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 0x1, 0x2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442  # of Linux 5.12 and newer, the same on every architecture
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38

_LIMITS = {
    "cpu_seconds": resource.RLIMIT_CPU,
    "memory_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
    "processes": resource.RLIMIT_NPROC,
    "open_files": resource.RLIMIT_NOFILE,
    "core_bytes": resource.RLIMIT_CORE,
}

_libc = ctypes.CDLL(None, use_errno=True)


class TimeIsUp(BaseException):
    """The timer, or a request to stop."""


def main(settings: dict[str, Any]) -> int:
    """Runs ``settings["command"]``; returns 0 when it ended by itself, however it ended, and
    ``settings["time_is_up"]`` when it was ended because its time was up, or on demand."""
    _stop_after(settings["wall_seconds"])
    _enter_namespaces(settings["user"] is None)
    first = os.fork()
    if first == 0:
        _tell_and_exit(_first_process, settings)
    try:
        # Not yet reaped, its id belongs to nobody else, so that it can be killed safely at any moment.
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        code = 0
    except TimeIsUp:
        os.kill(first, signal.SIGKILL)
        code = settings["time_is_up"]
    _ignore_requests()
    _, status = os.waitpid(first, 0)  # returns when nothing is left of the namespace
    return code or abs(os.waitstatus_to_exitcode(status))


def _stop_after(seconds: float) -> None:
    def stop(*_: Any) -> NoReturn:
        _ignore_requests()
        raise TimeIsUp

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _ignore_requests() -> None:
    for number in (signal.SIGALRM, signal.SIGTERM):
        # Not SIG_IGN: Python complains on standard error of a signal that came before and was not handled yet.
        signal.signal(number, lambda *_: None)


def _tell_and_exit(run: Callable[..., Any], *arguments: Any) -> NoReturn:
    """Runs a function in a child process, which must not go on to its parent's code."""
    try:
        run(*arguments)
    except BaseException as error:  # including TimeIsUp: the child has the parent's handlers until it sets its own
        os.write(2, f"{type(error).__name__}: {error}".encode(errors="replace"))
        os._exit(1)
    os._exit(0)


def _enter_namespaces(as_new_user: bool) -> None:
    # The process namespace is that of the children to come, not of this process.
    names = {name: f"/proc/self/ns/{'pid_for_children' if name == 'pid' else name}" for name in _CLONE}
    before = {name: os.stat(path).st_ino for name, path in names.items()}
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(sum(_CLONE.values()) | (_CLONE_NEWUSER if as_new_user else 0)), "entering new namespaces")
    if as_new_user:
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INNER_ID} {uid} 1"),
            ("gid_map", f"{INNER_ID} {gid} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(text)
    for name, path in names.items():
        # A namespace without a process in it yet cannot be looked at.
        if name != "pid" and os.stat(path).st_ino == before[name]:
            raise RuntimeError(f"the {name} namespace is still that of the machine")


def _first_process(settings: dict[str, Any]) -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "tying the sandbox to its launcher")
    # Should the launcher have died before that took effect.
    _stop_after(settings["wall_seconds"] + 1)
    if os.getpid() != 1:
        raise RuntimeError("the process namespace is still that of the machine")
    _build_root(settings)
    command = os.fork()
    if command == 0:
        _tell_and_exit(_become_command, settings)
    # Nothing that the command could reach here: this process holds no more privilege than it needs to end.
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    while os.wait()[0] != command:
        pass


def _build_root(settings: dict[str, Any]) -> None:
    root = settings["root"]
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, "")
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in settings["visible"]:
        target = root + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        _mount(path, target, None, _MS_BIND | _MS_REC, "")
        _make_read_only(target, _AT_RECURSIVE)
    home = root + HOME
    os.makedirs(home, exist_ok=True)
    _mount("tmpfs", home, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={settings['home_bytes']},mode=700")
    if settings["user"] is not None:
        os.chown(home, settings["user"], settings["user"])
    _make_read_only(root, 0)
    os.chroot(root)
    os.chdir(HOME)


def _become_command(settings: dict[str, Any]) -> NoReturn:
    for request in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(request, signal.SIG_DFL)
    user = settings["user"]
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "giving up privileges")
    for name, number in _LIMITS.items():
        resource.setrlimit(number, (settings[name], settings[name]))
    _verify(settings)
    told = os.dup(2)  # closed by itself when the command starts
    os.dup2(1, 2)
    try:
        os.execve(settings["command"][0], settings["command"], {"HOME": HOME, "TMPDIR": HOME})
    except OSError:
        os.dup2(told, 2)
        raise


def _verify(settings: dict[str, Any]) -> None:
    """Raises unless this process is cut off and limited as the settings say."""
    if 0 in (*os.getresuid(), *os.getresgid()):
        raise RuntimeError("the program would still be root")
    try:
        os.kill(-1, 0)  # asks who could be signalled, and signals nobody
    except ProcessLookupError:
        pass
    else:
        raise RuntimeError("the program could still signal other processes")
    allowed = {path.split("/")[1] for path in (*settings["visible"], HOME)}
    if set(os.listdir("/")) != allowed:
        raise RuntimeError("the program could still see the machine's files")
    for name, number in _LIMITS.items():
        if resource.getrlimit(number) != (settings[name], settings[name]):
            raise RuntimeError(f"the limit of {name} does not hold")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str) -> None:
    words = (None if source is None else os.fsencode(source), os.fsencode(target), kind and kind.encode())
    _check(_libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None), f"mounting {target}")


def _make_read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    done = _libc.syscall(
        _SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, ctypes.byref(attributes), ctypes.sizeof(attributes)
    )
    _check(done, f"making {path} read-only")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise RuntimeError(f"{what} failed ({os.strerror(ctypes.get_errno())})")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        code = main(given)
    except TimeIsUp:
        code = given["time_is_up"]
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode(errors="replace"))
        code = 1
    os._exit(code)
