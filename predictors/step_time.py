"""How long will a step take: `StepTimePredictor`, the only class others use."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from kairos.predictors.features import attention_work, step_rows
from kairos.predictors.online import Corrections, factor_of, scaled_line
from kairos.predictors.step_model import Prediction, StepModel, kind_mask, load_of
from kairos.scheduler_core.domain import Line, Part, Profile
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import STEP_KINDS, StepKind


class StepTimePredictor:
    """Step times of one profile: quantiles in bulk, and the `StepTimes` that scheduling asks one by one."""

    def __init__(
        self, profile: Profile, models: Mapping[StepKind, StepModel], corrections: Corrections = MappingProxyType({})
    ) -> None:
        self.profile = profile
        self.models = {kind: models[kind] for kind in STEP_KINDS}
        self.corrections = corrections
        """What was learned since these models began to serve; none: they answer as they are."""
        self._prefill_factor = factor_of(corrections, "prefill")
        self._decode_factor = factor_of(corrections, "decode")
        self.prefill_line: Line = scaled_line(models["prefill"].line, self._prefill_factor)
        self.decode_line: Line = scaled_line(models["decode"].line, self._decode_factor)
        self._prefill = models["prefill"].surface
        self._decode = models["decode"].surface
        self._further_s = models["prefill"].further_s

    @property
    def source(self) -> str:
        """Where the numbers come from, kind by kind; tells what was not measured for this profile."""
        return "; ".join(f"{kind}: {model.source}" for kind, model in self.models.items())

    @property
    def is_borrowed(self) -> bool:
        """Whether prefill or decode steps of this profile were not measured; `source` tells what stands in."""
        return not (self.models["prefill"].measured and self.models["decode"].measured)

    def predict(self, x: FloatArray) -> Prediction:
        """Predict n steps at once, of any kinds; one step is n = 1.

        Args:
            x: (n, len(FEATURES)) rows from `features.step_rows`.

        Returns:
            ``lower_s``, ``median_s`` and ``upper_s``, each (n,), with 0 < lower_s <= median_s <= upper_s.
        """
        quantiles = np.full((3, len(x)), np.nan)
        for kind, model in self.models.items():
            rows = kind_mask(kind, x)
            if rows.any():
                quantiles[:, rows] = model.predict(x[rows])
                if kind in self.corrections:
                    correction = self.corrections[kind]
                    median_s = correction.median * quantiles[1, rows]
                    lower, upper = correction.bounds(load_of(kind, x[rows]))
                    quantiles[:, rows] = median_s * lower, median_s, median_s * upper
        return Prediction(*quantiles)

    def predict_step(
        self,
        n_requests: int = 0,
        new_tokens: int = 0,
        cached_tokens: int = 0,
        batch_size: int = 0,
        sum_context_tokens: int = 0,
    ) -> Prediction:
        """One step, by its sums; the quantiles are (1,)."""
        work = attention_work(n_requests, new_tokens, cached_tokens)
        return self.predict(
            step_rows(
                n_requests=n_requests,
                new_tokens=new_tokens,
                attention_work=work,
                batch_size=batch_size,
                sum_context_tokens=sum_context_tokens,
            )
        )

    def prefill_step_s(self, parts: Sequence[Part], noise: Sequence[float] | None = None) -> float:
        """Median seconds of one prefill step.

        With noise: times the mean of the factors, each weighted by its part's work; the fixed cost goes with the first.
        """
        tokens, work = 0, 0.0
        for new, context in parts:
            tokens += new
            work += new * (context + new / 2)
        seconds = self._prefill_factor * (self._prefill.at(tokens, work) + self._further_s * (len(parts) - 1))
        if noise is None:
            return seconds
        a_s, b_s, c_s = self.prefill_line
        shares = [b_s * new + c_s * new * (context + new / 2) for new, context in parts]
        total = a_s + sum(shares)
        return seconds * (a_s * noise[0] + sum(f * share for f, share in zip(noise, shares, strict=True))) / total

    def remaining_prefill_s(self, new_tokens: int, context_tokens: int, chunk_tokens: int | None) -> float:
        """Median seconds over the chunks still to run, the last one shorter."""
        at = self._prefill.at
        seconds = 0.0
        while new_tokens > 0:
            new = new_tokens if chunk_tokens is None or new_tokens < chunk_tokens else chunk_tokens
            seconds += at(new, new * (context_tokens + new / 2))
            new_tokens -= new
            context_tokens += new
        return self._prefill_factor * seconds

    def decode_step_s(self, batch_size: int, sum_context_tokens: int) -> float:
        """Median seconds of one decode step among others."""
        return self._decode_factor * self._decode.at(batch_size, sum_context_tokens)
