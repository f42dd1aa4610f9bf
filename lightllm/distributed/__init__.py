"""Several ranks that compute one model: what each holds, and how their parts come together."""
