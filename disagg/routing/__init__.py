"""Placement as plain objects: cluster view, prefix index, policies, Router. No Ray, asyncio or clock."""
