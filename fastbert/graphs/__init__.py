"""Inference and training steps in CUDA graphs: one recording for each bucket of tokens."""
