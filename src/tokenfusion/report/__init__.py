"""The report room: a run folder as one self-contained page, and several runs side by side."""

from __future__ import annotations

from tokenfusion.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
