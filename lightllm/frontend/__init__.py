"""Between HTTP and the engine: tokenizing, generations, detokenizing.

Runs in the frontend process; never imports torch.
"""
