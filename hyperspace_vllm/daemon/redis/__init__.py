"""A fleet's Redis as a store of responses and as a registry. Optional; while it is away, lookups in it are misses."""
