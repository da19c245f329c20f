"""Live experiments between two strategies, the pure part: no database, no HTTP, no clock. See docs/statistics.md."""
