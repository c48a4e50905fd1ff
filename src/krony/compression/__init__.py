"""``krony.compress``: what is replaced, how parameters are allocated, and the short descents after the start."""
