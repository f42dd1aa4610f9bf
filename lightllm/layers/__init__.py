"""The parts that models are put together from; each computes and holds weights, none knows a model."""
