"""The command line: ``spanwise run``, ``serve``, ``chat``, ``bench`` and ``devices``."""
