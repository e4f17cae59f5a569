"""Which replica does what. Pure state machines: events in, decisions out."""
