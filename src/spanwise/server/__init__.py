"""The HTTP face: OpenAI-compatible routes over the engine."""
