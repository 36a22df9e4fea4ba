"""disagg: LLM serving with prefill and decode in separate pools of Ray actors."""
