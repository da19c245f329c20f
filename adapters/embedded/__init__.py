"""What every plugin inside an engine shares: its settings, the view it keeps, the plan of a step, what it reports.

Nothing here knows an engine; nothing here needs more than the base install.
"""
