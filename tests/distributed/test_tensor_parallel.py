"""Every model on 2 and 3 ranks against the same model on one, in steps as an engine would make them."""

import pytest
import torch

from lightllm.distributed.parallel_state import Parallel
from lightllm.errors import ConfigError
from lightllm.models import ARCHITECTURES
from tests.distributed.ranks import run_ranks
from tests.models.test_loader import pack
from tests.models.tiny import Sequences, config_of, load, make_oracle, source_of

LENGTHS = (20, 1, 33)
STEPS = ({0: 20, 2: 9}, {1: 1}, {2: 24})
# Options that are cut in a way of their own: biases on both sides of a sum, fused and reordered rows.
OPTIONS = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "InternLM2ForCausalLM": {"attention_bias": True},
}


def logits(config, source, parallel: Parallel | None = None, **options) -> list[torch.Tensor]:
    """Logits of each step, the rows of all sequences below each other."""
    model = load(config, source, parallel=parallel, **options)
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    sequences = Sequences(model, ids)
    return [torch.cat(list(sequences.step(counts).values())) for counts in STEPS]


def assert_same_on_ranks(config, source, size: int, tolerance: float, **options) -> None:
    expected = logits(config, source, **options)
    leader, *others = run_ranks(size, lambda parallel: logits(config, source, parallel, **options))
    for ours, wanted in zip(leader, expected, strict=True):
        assert ours.shape == wanted.shape
        assert torch.allclose(ours, wanted, rtol=0, atol=tolerance * wanted.abs().max())
    assert {step.shape[1] for steps in others for step in steps} == {0}


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranks_compute_what_one_does(architecture, size):
    oracle = make_oracle(architecture, **OPTIONS.get(architecture, {}))
    assert_same_on_ranks(config_of(oracle), source_of(oracle), size, 1e-5)


def packed(source):
    """All linears quantised, those that are cut by columns in blocks of 32."""
    for name, tensor in source.tensors.items():
        if tensor.dim() == 2:
            source.tensors[name] = pack(tensor, "Q4_1" if "v_proj" in name or "down" in name else "Q8_0")
    return source


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Glm4ForCausalLM", "Phi3ForCausalLM"])
@pytest.mark.parametrize("is_kept", [True, False], ids=["packed", "unpacked"])
def test_quantised_weights_are_cut_on_the_borders_of_their_blocks(architecture, is_kept):
    oracle = make_oracle(architecture, head_dim=32, tie_word_embeddings=True)
    assert_same_on_ranks(config_of(oracle), packed(source_of(oracle)), 3, 1e-5, packed=is_kept)


def test_quantised_heads_that_share_a_block_cannot_be_spread():
    oracle = make_oracle("LlamaForCausalLM")  # heads of 16 columns
    with pytest.raises(ConfigError, match=r"blocks of 32 columns.*values of --tp that work.* are 1$"):
        run_ranks(3, lambda parallel: load(config_of(oracle), packed(source_of(oracle)), parallel=parallel))


class Watched:
    """A source that notes what is read."""

    def __init__(self, source) -> None:
        self.source, self.read = source, {}

    def __getattr__(self, name):
        return getattr(self.source, name)

    def load(self, name):
        self.read[name] = self.source.load(name).numel()
        return self.source.load(name)

    def load_part(self, name, rows, columns):
        self.read[name] = self.read.get(name, 0) + len(rows) * (1 if columns is None else len(columns))
        return self.source.load_part(name, rows, columns)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "InternLM2ForCausalLM"])
def test_a_rank_reads_no_more_than_its_part(architecture):
    oracle = make_oracle(architecture)
    sources = [Watched(source_of(oracle)) for _ in range(2)]
    run_ranks(2, lambda rank: load(config_of(oracle), sources[rank.rank], parallel=rank))
    for name, tensor in source_of(oracle).tensors.items():
        read = sum(source.read[name] for source in sources)
        assert read == tensor.numel() * (1 if tensor.dim() == 2 else 2), name
