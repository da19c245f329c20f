"""Telemetry from engines that run: their metrics, loads and forward passes into rows, pushed to the control plane."""
