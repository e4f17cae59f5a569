"""The page at ``/``: the layout as it runs, its figures, and a box to try a prompt."""
