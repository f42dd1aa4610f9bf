"""Where weights come from: GGUF files, safetensors folders or a seeded random generator.

Every source speaks `weights.base.WeightSource` and uses HF tensor names. Importing this package must not
import torch: the frontend reads tokenizers out of GGUF metadata through `weights.gguf`.
"""
