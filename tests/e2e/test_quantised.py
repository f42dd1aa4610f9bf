"""A real server that rounds a folder's weights at load, against plain torch on the same rounded weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightllm.model_config import ModelConfig
from lightllm.models import tensor_shapes
from lightllm.weights.dummy import DummySource
from lightllm.weights.sources import open_weights
from lightllm.worker.quantization import quantized
from tests.e2e.conftest import TINY_CONFIG, Server
from tests.models.tiny import Sequences, load

PROMPT = [(37 * i) % 4000 + 10 for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder in bfloat16, as most are."""
    folder = tmp_path_factory.mktemp("float")
    config = {**TINY_CONFIG, "torch_dtype": "bfloat16"}
    model = ModelConfig.from_hf(config)
    source = DummySource(tensor_shapes(model), model.dtype)
    save_file({name: source.load(name) * 4 for name in source.names()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("quant_type", "backend"),
    [
        ("w4", "native"),
        pytest.param("w4", "torch", marks=pytest.mark.slow),
        pytest.param("w8", "native", marks=pytest.mark.slow),
    ],
)
def test_a_folder_is_rounded_at_load(folder: Path, quant_type: str, backend: str) -> None:
    flags = ("--tokenizer_dir", "smollm2-135m", "--attention_backend", backend)
    server = Server("--model_dir", str(folder), "--quant_type", quant_type, *flags)
    try:
        body = {"model": "default_model_name", "prompt": PROMPT, "max_tokens": 1, "echo": True, "logprobs": 0}
        reply = server.client.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        got = reply.json()["choices"][0]["logprobs"]["token_logprobs"][1 : len(PROMPT)]
    finally:
        assert server.stop() == 0
    log = "".join(server.log)
    assert f"--quant_type {quant_type}: rounding while reading" in log
    assert ("without C kernels: weights are unpacked anew" in log) == (backend == "torch")
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    model = load(config, quantized(open_weights(folder), quant_type, config), packed=True)
    logits = Sequences(model, [PROMPT]).step({0: len(PROMPT)})[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    difference = (torch.tensor(got) - expected).abs().mean().item()
    # The kernels round activations to 8 bits; plain torch does not.
    assert difference < (1e-3 if backend == "torch" else 0.1)


def test_a_packed_file_is_refused_by_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightllm.server.api_server", "--port", "0", "--quant_type", "w4"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "is packed as Q" in done.stderr
    assert "leave --quant_type out" in done.stderr
    assert "Traceback" not in done.stderr
