"""Measurements of running servers: ``spanwise bench``."""
