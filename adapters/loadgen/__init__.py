"""A load generator: a trace sent to an OpenAI-compatible endpoint, each request at its time (docs/loadgen.md)."""

from kairos.adapters.loadgen.files import write_live_run
from kairos.adapters.loadgen.send import Endpoint, LiveRun, send_all

__all__ = ["Endpoint", "LiveRun", "send_all", "write_live_run"]
