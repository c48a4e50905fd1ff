"""Training a compressed model with transformers' Trainer."""
