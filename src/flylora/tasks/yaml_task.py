"""Tasks of the user's own, described by a YAML file."""

from __future__ import annotations

from pathlib import Path

from flylora.errors import UserError
from flylora.tasks.base import Task


def load_yaml_task(path: Path, data_dir: Path | None = None) -> Task:
    """The task a YAML file describes."""
    if not path.is_file():
        raise UserError(f"There is no task file {path}: give the path of a YAML file or the name of a task.")
    raise NotImplementedError
