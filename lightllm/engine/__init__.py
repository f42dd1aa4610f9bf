"""The engine: one process that owns the scheduler and drives an executor."""
