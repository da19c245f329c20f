"""A small real engine on PyTorch: prefill, decode, KV handed over, with the policies in the loop (docs/torch.md)."""
