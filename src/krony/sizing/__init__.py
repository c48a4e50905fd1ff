"""Quality against size: what each size of one model loses, and the smallest that keeps a promise."""
