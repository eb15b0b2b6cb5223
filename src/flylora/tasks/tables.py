"""Tables of rows from data files or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flylora.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Format = Literal["json", "csv", "parquet"]
_SUFFIXES: dict[str, Format] = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where a task's rows are.

    Attributes:
        train: File or files of the training split; with ``hub``, the name of a split there.
        validation: Likewise; instead of it a ``validation_fraction`` of train can be held out.
        test: Likewise.
        format: json (also JSON lines), csv or parquet; by default told by the name of each file.
        column_names: For CSV files without a header.
        hub: Name of a data set on the Hugging Face hub, instead of files.
        subset: Its configuration, if it has several.
        revision: Its branch, tag or commit.
        validation_fraction: Share of the prompts of train that are held out for validation.
        test_fraction: Share of the prompts of train that are held out for testing.
        seed: Fixes which.
    """

    train: str | list[str] | None = None
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    format: Format | None = None
    column_names: list[str] | None = None
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    seed: int = 0


def read_table(source: DataSource, named: str | list[str], folder: Path) -> Dataset:
    """The rows of one split, nested columns flattened to dotted names.

    Args:
        source: Where the rows are.
        named: What ``source`` names for the split: files relative to ``folder``, or a split of the hub's data set.
        folder: What the files are relative to.

    Raises:
        UserError: The data are missing, empty or not readable.
    """
    if source.hub is not None:
        where, table = f"the hub's data set {source.hub}", _read_hub(source, named)
    else:
        paths = [folder / name for name in ([named] if isinstance(named, str) else named)]
        where, table = ", ".join(map(str, paths)), _read_files(source, paths)
    if table.num_rows == 0:
        raise UserError(f"There are no rows in {where}: give data that hold at least one.")
    return table.flatten()


def _read_hub(source: DataSource, named: str | list[str]) -> Dataset:
    if not isinstance(named, str):
        raise UserError(f"A split of the hub's data set {source.hub} must be one name, not a list: write '{named[0]}'.")
    return _load(source.hub, f"the hub's data set {source.hub}", source.subset, split=named, revision=source.revision)


def _read_files(source: DataSource, paths: Sequence[Path]) -> Dataset:
    for path in paths:
        if not path.is_file():
            raise UserError(f"There is no data file {path}: check its name and the folder it is looked for in.")
        with path.open("rb") as file:
            if not file.read(1 << 16).strip():
                raise UserError(f"The data file {path} is empty: give one that holds at least one row.")
    forms = {source.format or _SUFFIXES.get(path.suffix.lower()) for path in paths}
    if None in forms or len(forms) > 1:
        raise UserError(
            f"The format of {', '.join(map(str, paths))} cannot be told from the name: set data.format to json, csv "
            "or parquet."
        )
    form = str(forms.pop())
    # Text stays as it is written: neither "007" nor "NA" nor an empty cell is to be read as something else.
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False} if form == "csv" else {}
    if source.column_names is not None:
        if form != "csv":
            raise UserError("data.column_names is for CSV files without a header: leave it out for other formats.")
        options |= {"column_names": source.column_names, "header": None}
    return _load(
        form, paths[0] if len(paths) == 1 else f"{paths[0]} and the files beside it", **_files(paths), **options
    )


def _files(paths: Sequence[Path]) -> dict[str, Any]:
    return {"data_files": [str(path) for path in paths], "split": "train"}


def _load(name: str | None, where: str | Path, *arguments: Any, **options: Any) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(name, *arguments, **options)
    except Exception as error:  # the readers under it raise errors of a dozen unrelated classes
        cause = error.__cause__ or error.__context__ or error
        reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        raise UserError(f"Could not read {where} ({reason.rstrip('.')}): check its format and its content.") from error
