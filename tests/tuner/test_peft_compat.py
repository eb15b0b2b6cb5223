"""A PEFT version that was not tried is refused in one sentence, at import."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("version", "refused"), [("0.20.0", True), ("0.22.0", True), ("0.21.9", False)])
def test_only_tried_versions_are_imported(version: str, refused: bool) -> None:
    code = f"import peft\npeft.__version__ = '{version}'\nimport flylora"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert bool(done.returncode) == refused
    if refused:
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: This flylora works with PEFT from 0.21.0 to before 0.22")
        assert f"PEFT {version} is installed: run pip install 'peft>=0.21.0,<0.22'." in last
