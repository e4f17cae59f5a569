"""One worker's step: rows to tensors, forward, hand-over, sampling."""
