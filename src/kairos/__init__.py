"""Kairos: an SLO-aware scheduler for LLM inference split into prefill and decode instances."""

__version__ = "0.1.0"
