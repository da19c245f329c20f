"""The files of a live run: requests.csv and summary.json as of a simulated one, and lag.json (docs/files.md)."""

from pathlib import Path

import msgspec
import numpy as np

from kairos.adapters.loadgen.send import LiveRun
from kairos.adapters.simulator.evidence import Meta, Summary, run_metrics
from kairos.adapters.simulator.log import write_requests


def write_live_run(run: LiveRun, folder: Path, meta: Meta) -> Summary:
    """Write the files of a run into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_requests(run.requests, folder)
    summary = Summary(meta, run_metrics(run.requests, run.decision_us, run.gaps))
    lags = run.lag_s[np.isfinite(run.lag_s)]
    told = {"p50_s": 0.0, "p99_s": 0.0, "max_s": 0.0}
    if lags.size:
        told = dict(zip(told, map(float, np.quantile(lags, (0.5, 0.99, 1.0))), strict=True))
    for name, content in (("summary", summary), ("lag", told | {"problems": dict(run.problems)})):
        (folder / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    return summary
