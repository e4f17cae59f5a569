"""Frozen records that pass between rooms. Imports nothing of the package; holds no logic but checks."""
