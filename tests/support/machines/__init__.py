"""The machines of the core as tests drive them: events go in, effects come out, and time is a number."""
