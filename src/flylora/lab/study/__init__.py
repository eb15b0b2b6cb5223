"""Studies: a grid of models, methods, tasks and seeds, trained, merged and evaluated in one resumable run folder."""

from __future__ import annotations

from flylora.lab.study.config import Study, StudyOptions
from flylora.lab.study.study_file import load_study

__all__ = ["Study", "StudyOptions", "load_study"]
