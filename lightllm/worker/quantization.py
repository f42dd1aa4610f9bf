"""What `--quant_type` means for a model: which of its weights are rounded, and to what.

Layers of `w4` have 4 bits a weight. Embedding and head, which have a row for each token, get 8 bits in either
type: their errors go straight into the hidden states and into the logits, and a model that ties them pays for
both at once. Norms and biases stay as they are. Runs in the worker.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from lightllm.model_config import ModelConfig
from lightllm.models import weight_specs
from lightllm.weights.base import WeightSource
from lightllm.weights.codes import BLOCK
from lightllm.weights.quantize import QuantizedSource

logger = logging.getLogger(__name__)

LAYER_PACKINGS: Mapping[str, str] = MappingProxyType({"w8": "Q8_0", "w4": "Q4_1"})
TABLE_PACKING = "Q8_0"


def quantized(source: WeightSource, quant_type: str, config: ModelConfig) -> WeightSource:
    """Return a source that quantises the model's weights as they are read; `none` returns the same source.

    Raises:
        ModelLoadError: the model is not supported.
    """
    if quant_type == "none":
        return source
    packings = choose_packings(quant_type, config)
    counts = Counter(packings.values())
    logger.info(
        "--quant_type %s: rounding while reading: %s; norms and biases stay as they are",
        quant_type,
        ", ".join(f"{count} tensors to {kind}" for kind, count in sorted(counts.items())),
    )
    return QuantizedSource(source, packings, f"--quant_type {quant_type}")


def choose_packings(quant_type: str, config: ModelConfig) -> dict[str, str]:
    """The packing of every weight that is rounded, by checkpoint name; one that cannot be is logged."""
    packings = {}
    for spec in weight_specs(config).linears.values():
        is_table = sum(spec.parts.values()) == config.vocab_size
        for part in spec.parts:
            name = f"{part}.weight"
            if spec.in_features % BLOCK:
                logger.warning(
                    "--quant_type %s: %s stays as it is: rows of %d, which is no multiple of %d",
                    *(quant_type, name, spec.in_features, BLOCK),
                )
            else:
                packings[name] = TABLE_PACKING if is_table else LAYER_PACKINGS[quant_type]
    return packings
