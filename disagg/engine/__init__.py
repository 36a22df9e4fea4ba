"""The engine: pure Python, no torch, no clock. One engine, no roles."""
