"""Step times measured: of an engine by its HTTP API, of a model shape on this machine's device (docs/torch.md)."""
