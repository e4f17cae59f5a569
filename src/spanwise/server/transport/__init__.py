"""The wire: connections, their limits and their end, around any ASGI application."""
