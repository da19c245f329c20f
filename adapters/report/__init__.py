"""report.html from results.json: one file that opens offline, with the findings as headings.

``results`` reads, ``comparison`` computes, ``findings`` and ``timeline`` say, ``charts`` place, ``report.html`` shows.
"""

from kairos.adapters.report.render import render, write_report
from kairos.adapters.report.results import read_file

__all__ = ["read_file", "render", "write_report"]
