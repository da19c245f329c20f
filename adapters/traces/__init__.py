"""Traces: recorded or synthetic arrivals, from many formats, into one `Trace`."""

from kairos.adapters.traces.describe import Description, describe
from kairos.adapters.traces.formats import FORMATS, Format, read_any, read_trace, window
from kairos.adapters.traces.kairos_csv import write_trace
from kairos.adapters.traces.trace import Trace

__all__ = ["FORMATS", "Description", "Format", "Trace", "describe", "read_any", "read_trace", "window", "write_trace"]
