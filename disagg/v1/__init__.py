"""Generated from proto/disagg/v1 by `make proto`."""
