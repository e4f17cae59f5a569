"""What things cost in bytes and seconds. Pure arithmetic."""
