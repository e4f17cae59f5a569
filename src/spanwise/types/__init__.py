"""Frozen records that pass between rooms. No logic but checks."""
