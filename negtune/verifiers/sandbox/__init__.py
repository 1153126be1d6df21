"""Runs Python that a model wrote, and tests of it, in two processes that share nothing but plain values.

`wire` frames and encodes, `isolate` takes rights away, `zygote` forks jobs inside the sandbox, `subject` is the process
of the foreign code, `judge` the process of the tests, `launch` is the side of the caller. Only `launch` runs outside.
All but `launch` are standard library only: they are imported where nothing else may be installed.
"""
