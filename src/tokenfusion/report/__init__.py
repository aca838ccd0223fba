"""The report room: a run folder as one self-contained page, and several runs side by side."""

from __future__ import annotations

from tokenfusion.report.compare import write_comparison
from tokenfusion.report.page import write_report

__all__ = ["write_comparison", "write_report"]
