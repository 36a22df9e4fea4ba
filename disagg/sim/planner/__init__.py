"""Placement search: which workers, how many of each and how parallel, for a workload and its objectives."""
