"""The CPU decoder in C++: its build and the layout of its weights."""
