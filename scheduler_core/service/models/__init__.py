"""Step-time models while the service runs: which serve, how they are trained, judged, corrected, watched."""
