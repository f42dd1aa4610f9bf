"""HTTP: routes, request parsing and answers.

Runs in the frontend process; imports frontend and L0, never torch.
"""
