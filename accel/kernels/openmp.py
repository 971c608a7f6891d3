"""One OpenMP runtime for torch and numba, where numba's is loaded first: import `accel` before torch.

Torch comes with a copy of libgomp, and numba asks for the system's by another name. Loaded after torch, numba brings a
second runtime with threads of its own, and the waiting threads of each take the cores from the other. Loaded before,
the system's library serves both (benchmarks/training_step.py at width 16: 1.33 instead of 1.36 times the plain step).
"""

from contextlib import suppress

with suppress(ImportError):  # a numba without OpenMP has no such pool
    import numba.np.ufunc.omppool  # noqa: F401
