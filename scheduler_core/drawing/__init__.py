"""How Kairos draws: SVG macros, one stylesheet, number formats and safe names, shared by the report and the page.

A template imports ``macros.svg.html`` and takes the functions of ``text`` and ``scale`` by name; see ``environment``.
Four series colours of equal weight, told apart by dash and marker too: ``Series.style`` 1 to 4; 0 is the grey rest.
"""

from kairos.scheduler_core.drawing.environment import Series, environment, stylesheet

__all__ = ["Series", "environment", "stylesheet"]
