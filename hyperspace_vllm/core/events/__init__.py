"""What the machines hear and what they want done: events and effects, as frozen dataclasses, by domain.

An effect and the events that answer it are in one file, and its docstring names them. An effect that starts work is
answered by exactly one of them, unless it is cancelled; one that is not answered is done as well as possible, and the
core never learns how it ended. Events for a lookup that has ended are ignored. Payload bytes never appear here: the
core sees keys, ids, sizes and verdicts. RequestKeys stay in the shell that knows a lookup's number.

`vocabulary` has all of them as two unions, Event and Effect. The room holds no logic.
"""
