"""What differs between devices: memory, arenas, kernels."""
