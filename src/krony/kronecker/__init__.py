"""Sums of Kronecker products: algebra, schemes, and the layers that multiply by them. Knows torch, not transformers."""
