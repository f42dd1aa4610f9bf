"""The worker: one rank that owns the model, the KV tensors and the sampler."""
