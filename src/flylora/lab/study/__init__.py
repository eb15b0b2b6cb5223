"""Studies: a grid of models, methods, tasks and seeds, trained, merged and evaluated in one resumable run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flylora.lab.study.config import Study, StudyOptions, load_study

if TYPE_CHECKING:
    from flylora.lab.study.run import StudyResult

__all__ = ["Study", "StudyOptions", "load_study", "study"]


def study(options: StudyOptions) -> StudyResult:
    """Runs a study, or the part of it that is not done yet; see ``flylora.lab.study.run.run_study``."""
    # torch is imported only now, so that a plan or asking for help stays quick.
    from flylora.lab.study.run import run_study

    return run_study(options)
