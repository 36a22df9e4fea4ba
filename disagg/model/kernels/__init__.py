"""Triton kernels of the model, one a file, each beside a plain torch reference (reference.py).

Import a kernel's module only where its backend was chosen: it imports triton, which CPU installs lack.
"""
