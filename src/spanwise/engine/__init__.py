"""Carries out what the pure machines decide, with real executors and a real clock."""
