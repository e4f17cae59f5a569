"""Decides what each step computes: sequences and blocks in, step plans out. Sans-IO, no torch."""
