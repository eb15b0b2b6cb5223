"""Runs short scripts in processes that have imported neither PEFT nor flylora, for the price of one start."""

from __future__ import annotations

import json
import subprocess
import sys

# The slow libraries below PEFT are imported once; each script then runs in a fork of that process.
_SERVER = """
import io, json, os, sys, traceback, contextlib
import torch, transformers, accelerate, transformers.modeling_utils, transformers.models.bloom.modeling_bloom
with contextlib.suppress(ImportError):
    import bitsandbytes
assert not {"peft", "flylora"} & set(sys.modules)
results = {}
for name, script in json.load(sys.stdin).items():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                exec(compile(script, name, "exec"), {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc()
        with os.fdopen(writer, "w") as pipe:
            pipe.write(out.getvalue())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        results[name] = pipe.read()
    os.waitpid(child, 0)
json.dump(results, sys.stdout)
"""


def run_fresh(scripts: dict[str, str], timeout: float = 240) -> dict[str, str]:
    """What each script printed, tracebacks included."""
    finished = subprocess.run(
        [sys.executable, "-c", _SERVER],
        input=json.dumps(scripts),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    results: dict[str, str] = json.loads(finished.stdout)
    return results
