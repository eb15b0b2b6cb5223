"""Merging saved adapters into one; see docs/merging.md."""

from __future__ import annotations
