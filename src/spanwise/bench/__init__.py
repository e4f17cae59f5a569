"""Measurements of servers, engines, devices and attention: ``spanwise bench``."""
