"""The command line: ``spanwise run``, ``spanwise devices``."""
