"""All degree arithmetic: who stands where, and who owns which layers, heads, columns, experts."""
