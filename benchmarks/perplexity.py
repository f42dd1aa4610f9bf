#!/usr/bin/env python3
"""Text quality: perplexity of a fixed text by a real server, once for each set of flags.

    python benchmarks/perplexity.py --variant fp32="--dtype float32" --variant packed="" [--out FILE.json]
    python benchmarks/perplexity.py --make_folder DIR

The text's tokens go to `/v1/completions` in windows of 1,024, each half a window further than the one
before; the server echoes them with their log-probabilities, of which the second half of a window counts (all
of the first). So every token but the first is counted once, nearly all of them behind at least 512 others.
"error" is the standard error of "ratio", the perplexity over that of the first variant, token by token.

`--make_folder` writes the default model as an HF folder of float32 weights for `--quant_type`. Its file is
rounded to blocks of 32 already, and rounding the same blocks again would lose nothing; so hidden dimensions,
the heads' dimensions and those of the MLPs are put into another order, which is the same model, but its
blocks hold other weights.
"""

import argparse
import json
import math
import shlex
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
from machine import describe_run
from serve_cpu import start_server, stop_server

TEXT = Path(__file__).parent / "texts" / "english.txt"
WINDOW, STRIDE = 1024, 512


def score(url: str, token_ids: list[int]) -> list[float]:
    """The log-probability of every token but the first."""
    found: list[float] = []
    for start in range(0, len(token_ids) - STRIDE, STRIDE):
        window = token_ids[start : start + WINDOW]
        body = {"model": "default_model_name", "prompt": window, "echo": True, "logprobs": 0, "max_tokens": 0}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
        assert reply.status_code == 200, reply.text
        logprobs = reply.json()["choices"][0]["logprobs"]["token_logprobs"][: len(window)]
        found += logprobs[len(found) + 1 - start :]
    assert len(found) == len(token_ids) - 1, (len(found), len(token_ids))
    return found


def measure(flags: str, text: str) -> dict[str, Any]:
    """Start a server with these flags and score the text."""
    process, url = start_server(["--max_req_total_len", str(WINDOW + 8), *shlex.split(flags)])
    try:
        ids = httpx.post(f"{url}/tokenize", json={"prompt": text}, timeout=60).json()["tokens"]
        began = time.perf_counter()
        logprobs = score(url, ids)
        return {"logprobs": logprobs, "num_tokens": len(ids), "wall_s": time.perf_counter() - began}
    finally:
        stop_server(process)


def compared(result: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """Perplexity, and how sure its ratio to the base's is."""
    differences = [b - a for a, b in zip(result["logprobs"], base["logprobs"], strict=True)]
    perplexity = math.exp(-statistics.fmean(result["logprobs"]))
    return {
        "perplexity": round(perplexity, 4),
        "ratio": round(math.exp(statistics.fmean(differences)), 5),
        "error": round(statistics.stdev(differences) / math.sqrt(len(differences)), 5),
        "num_tokens": result["num_tokens"],
        "wall_s": round(result["wall_s"], 1),
    }


def make_folder(folder: Path) -> None:
    """Write the default model in another order; see the module."""
    import torch
    from safetensors.torch import save_file

    from lightllm.server.model_files import describe_files, locate_model
    from lightllm.weights.base import PackedTensor
    from lightllm.weights.sources import open_weights

    files = locate_model()
    config = describe_files(files).config
    source = open_weights(files.path)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randperm(config.hidden_size, generator=generator)
    group = config.num_attention_heads // config.num_key_value_heads
    tensors = {}
    for name in source.names():
        tensor = source.load(name)
        tensors[name] = tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor.clone()
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")):
            tensors[name] = tensor[hidden]
        else:
            tensors[name] = tensor[:, hidden]
    for i in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        inner = torch.randperm(config.intermediate_size, generator=generator)
        heads = [
            torch.randperm(config.head_dim, generator=generator) for _ in range(config.num_key_value_heads)
        ]
        rows = torch.cat([h + j * config.head_dim for j, h in enumerate(heads)])
        columns = torch.cat(
            [heads[j // group] + j * config.head_dim for j in range(config.num_attention_heads)]
        )
        for name in (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"):
            tensors[name] = tensors[name][inner]
        tensors[f"{mlp}.down_proj.weight"] = tensors[f"{mlp}.down_proj.weight"][:, inner]
        tensors[f"{attention}.v_proj.weight"] = tensors[f"{attention}.v_proj.weight"][rows]
        tensors[f"{attention}.o_proj.weight"] = tensors[f"{attention}.o_proj.weight"][:, columns]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    keys = {"architectures": [config.architecture], "model_type": "llama", "torch_dtype": "float32"}
    fields = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
        *("tie_word_embeddings", "hidden_act", "bos_token_id"),
    )
    keys |= {field: getattr(config, field) for field in fields} | {"eos_token_id": config.eos_token_ids}
    (folder / "config.json").write_text(json.dumps(keys, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=FLAGS")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--make_folder", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.make_folder:
        make_folder(args.make_folder)
        return
    text = args.text.read_text(encoding="utf-8")
    results: dict[str, dict[str, Any]] = {}
    for name, flags in (pair.split("=", 1) for pair in args.variant):
        results[name] = measure(flags, text)
        base = next(iter(results.values()))
        print(name, json.dumps(compared(results[name], base)), flush=True)
    base = next(iter(results.values()))
    report = {**describe_run(), "text": args.text.name, "window": WINDOW, "stride": STRIDE}
    report["result"] = {name: compared(result, base) for name, result in results.items()}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
