"""Asyncio services around the pure parts: worker, router, orchestrator, tokenizer, metrics. No Ray here."""
