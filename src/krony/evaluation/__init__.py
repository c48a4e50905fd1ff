"""Measuring a model: perplexity, speed, norms, and tasks of the lm-evaluation-harness."""
