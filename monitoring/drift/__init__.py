"""Has a window of production rows moved away from the reference profile?

`judge_window` is the table of contents; everything below it is a pure function of numpy arrays.
"""

from monitoring.drift.judge import judge_window
from monitoring.drift.result import ColumnDrift, DriftSettings, Estimate, WindowDrift

__all__ = ["ColumnDrift", "DriftSettings", "Estimate", "WindowDrift", "judge_window"]
