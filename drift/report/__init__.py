"""One self-contained HTML page about a run, made from the files in its folder."""

from drift.report.page import write

__all__ = ["write"]
