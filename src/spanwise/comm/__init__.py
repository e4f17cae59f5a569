"""Moving tensors between the ranks of one replica. Knows nothing of models."""
