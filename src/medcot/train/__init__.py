"""Optimizer steps, and what a person sees of them."""
