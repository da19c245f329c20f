"""Traces: recorded or synthetic arrivals, from many formats, into one `Trace`."""

from kairos.adapters.traces.kairos_csv import read_trace, write_trace
from kairos.adapters.traces.trace import Trace

__all__ = ["Trace", "read_trace", "write_trace"]
