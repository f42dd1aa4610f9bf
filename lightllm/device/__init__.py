"""What every device-side module shares: facts about the device, the KV pool and the batch of one step."""
