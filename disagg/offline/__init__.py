"""Inference from Python without a cluster."""
