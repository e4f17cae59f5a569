"""Requests that cannot be, as data, and the contract that the real server keeps with each."""
