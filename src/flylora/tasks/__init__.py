"""Tasks: what an adapter is trained on and measured by."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from flylora.errors import UserError
from flylora.tasks.base import Example, Split, Task

__all__ = ["Example", "Split", "Task", "load_task", "task_names"]

_BUILT_IN = ("capitals", "elements", "arithmetic", "python_output")


def task_names() -> list[str]:
    """The names of the built-in tasks."""
    return list(_BUILT_IN)


def load_task(name_or_yaml_path: str | Path, data_dir: str | Path | None = None) -> Task:
    """A built-in task by its name, or a task of the user's own from a YAML file.

    Args:
        name_or_yaml_path: One of ``task_names()``, or the path of a file that ends in .yaml or .yml.
        data_dir: The folder a YAML task's data files are relative to; the YAML file's own folder by default.

    Raises:
        UserError: No such task, or its YAML file or data are not what they should be.
    """
    name = str(name_or_yaml_path)
    if name in _BUILT_IN:
        return import_module(f"flylora.tasks.{name}").TASK
    if name.endswith((".yaml", ".yml")):
        from flylora.tasks.yaml_task import load_yaml_task

        return load_yaml_task(Path(name), None if data_dir is None else Path(data_dir))
    raise UserError(
        f"Unknown task '{name}': choose one of {', '.join(_BUILT_IN)}, or give the path of your own .yaml file."
    )
