"""Slow and dangerous work in other processes and threads: KZG, loro, hashing and coding."""
