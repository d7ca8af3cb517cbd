"""A fleet's Redis as a place for responses and as a registry. Optional; while it is away everything is a miss."""
