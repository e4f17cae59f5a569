"""Batch jobs: every item of an input through a model, each exactly once, whatever ends it."""
