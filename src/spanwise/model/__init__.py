"""Models of transformers: built without memory, cut by tables, loaded shard by shard."""
