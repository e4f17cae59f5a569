"""The records of the wire: what requests may say (pydantic) and what answers do say (msgspec)."""
