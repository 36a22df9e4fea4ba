"""The simulator: the live Router, Scheduler and BlockPool on virtual time, with a cost model as runner."""
