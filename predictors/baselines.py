"""What others predict step times with, for comparison: lookup table, line, random forest."""

from typing import Any

import msgspec
import numpy as np

from kairos.predictors.features import column
from kairos.predictors.prior import fit_nonnegative
from kairos.scheduler_core.domain import Line
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import StepKind


class LookupTable(msgspec.Struct, frozen=True):
    """The mean of what was seen in a cell; an empty cell answers as the nearest filled one.

    Cells: requests (or batch) by half octaves of tokens, and for prefill of attention work per token.

    Source: Wang and Yang 2026, arXiv 2605.02329 (the slack policy's table over batch size and sequence length).
    """

    kind: StepKind
    cells: list[list[float]]
    seconds: list[float]

    @staticmethod
    def fit(kind: StepKind, x: FloatArray, y: FloatArray) -> "LookupTable":
        """The table of rows (n, len(FEATURES)) that took y seconds (n,)."""
        cells, cell = np.unique(_cells(kind, x), axis=0, return_inverse=True)
        cell = cell.ravel()
        return LookupTable(kind, cells.tolist(), (np.bincount(cell, y) / np.bincount(cell)).tolist())

    def predict(self, x: FloatArray) -> FloatArray:
        """Seconds (n,)."""
        cells, seconds = np.array(self.cells), np.array(self.seconds)
        asked, place = np.unique(_cells(self.kind, x), axis=0, return_inverse=True)
        nearest = np.array([np.abs(cells - cell).sum(axis=1).argmin() for cell in asked])
        result: FloatArray = seconds[nearest[place.ravel()]]
        return result


def _cells(kind: StepKind, x: FloatArray) -> FloatArray:
    """Cell coordinates, one apart per half octave."""
    batch, requests, new = column(x, "batch_size"), column(x, "n_requests"), column(x, "new_tokens")
    size = 2 * np.log2(np.maximum(batch + requests, 1))
    context = np.floor(2 * np.log2(np.maximum(column(x, "sum_context_tokens"), 1)))
    if kind == "decode":
        return np.stack([size, context], axis=1)
    tokens = np.floor(2 * np.log2(np.maximum(new, 1)))
    seen = np.floor(2 * np.log2(np.maximum(column(x, "attention_work") / np.maximum(new, 1), 1)))
    return np.stack([size, tokens, seen, context], axis=1)


def fit_line(kind: StepKind, x: FloatArray, y: FloatArray) -> Line:
    """a + b u + c v with non-negative coefficients: batch and summed context, or tokens and attention work."""
    matrix = _line_terms(kind, x)
    return Line(*(float(c) for c in fit_nonnegative(matrix, 3, y, np.ones(len(y)))))


def line_predict(kind: StepKind, line: Line, x: FloatArray) -> FloatArray:
    """Seconds (n,) of a line."""
    seconds: FloatArray = _line_terms(kind, x) @ np.array(line)
    return np.maximum(seconds, 1e-6)


def _line_terms(kind: StepKind, x: FloatArray) -> FloatArray:
    if kind == "decode":
        return np.stack([np.ones(len(x)), column(x, "batch_size"), column(x, "sum_context_tokens")], axis=1)
    tokens = column(x, "new_tokens") + column(x, "batch_size")
    return np.stack([np.ones(len(x)), tokens, column(x, "attention_work")], axis=1)


class Baselines(msgspec.Struct, frozen=True):
    """The small ones, fitted on the rows that the model was fitted on."""

    line: Line
    table: LookupTable

    @staticmethod
    def fit(kind: StepKind, x: FloatArray, y: FloatArray) -> "Baselines":
        """Both, on rows (n, len(FEATURES)) of one kind that took y seconds (n,)."""
        return Baselines(fit_line(kind, x, y), LookupTable.fit(kind, x, y))

    def predict(self, x: FloatArray) -> dict[str, FloatArray]:
        """Seconds (n,) by the name of the baseline."""
        return {"linear": line_predict(self.table.kind, self.line, x), "lookup": self.table.predict(x)}


class Forest:
    """A random forest on the feature rows.

    Source: Agrawal et al. 2024, Vidur, arXiv 2405.05465, section 4.3.
    """

    def fit(self, x: FloatArray, y: FloatArray) -> "Forest":
        """Learns from rows (n, len(FEATURES)) that took y seconds (n,)."""
        from sklearn.ensemble import RandomForestRegressor  # heavy, and only for comparison

        sample = None if len(y) <= 4000 else 4000
        self.forest: Any = RandomForestRegressor(50, min_samples_leaf=2, max_samples=sample, random_state=0, n_jobs=1)
        self.forest.fit(x, y)
        return self

    def predict(self, x: FloatArray) -> FloatArray:
        """Seconds (n,)."""
        seconds: FloatArray = self.forest.predict(x)
        return seconds
