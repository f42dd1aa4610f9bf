"""Every server command of the quick-start passes `--dry_run`, as a user copies it."""

import json
import shlex

import pytest

from lightllm.server import api_server, launch

# As printed there, console prompts and the last line's stray continuation included.
QUICKSTART = r"""
$ python -m lightllm.server.api_server --model_dir ~/models/Llama-2-7b-chat

$ LOADWORKER=8 python -m lightllm.server.api_server --model_dir ~/models/DeepSeek-R1 --tp 8 \
$ --graph_max_batch_size 100

$ LOADWORKER=8 python -m lightllm.server.api_server --model_dir ~/models/DeepSeek-R1 --tp 16 \
$ --graph_max_batch_size 100 --nccl_host master_addr --nnodes 2 --node_rank 0

$ LOADWORKER=8 python -m lightllm.server.api_server --model_dir ~/models/DeepSeek-R1 --tp 16 \
$ --graph_max_batch_size 100 --nccl_host master_addr --nnodes 2 --node_rank 1

$ python -m lightllm.server.api_server \
$ --model_dir /your/model/path \
$ --run_mode "pd_master" \
$ --host /your/host/ip \
$ --port 60011

$ CUDA_VISIBLE_DEVICES=0,1 KV_TRANS_USE_P2P=1 LOADWORKER=1 python -m lightllm.server.api_server \
$ --model_dir /data/model/Qwen2-7B/ \
$ --run_mode "prefill" \
$ --host /your/host/ip \
$ --port 8017 \
$ --tp 2 \
$ --nccl_port 2732 \
$ --max_total_token_num 400000 \
$ --tokenizer_mode fast \
$ --pd_master_ip /your/host/ip \
$ --pd_master_port 60011 \
$ --max_req_total_len 16000 \
$ --running_max_req_size 128 \
$ --disable_cudagraph

$ CUDA_VISIBLE_DEVICES=2,3 KV_TRANS_USE_P2P=1 LOADWORKER=10 python -m lightllm.server.api_server \
$ --model_dir /data/model/Qwen2-7B/ \
$ --run_mode "decode" \
$ --host /your/host/ip \
$ --port 8118 \
$ --nccl_port 12322 \
$ --tp 2 \
$ --max_total_token_num 400000 \
$ --graph_max_len_in_batch 2048 \
$ --graph_max_batch_size 16 \
$ --tokenizer_mode fast \
$ --pd_master_ip /your/host/ip \
$ --pd_master_port 60011

$ python -m lightllm.server.api_server \
$ --run_mode "config_server" \
$ --config_server_host /your/host/ip \
$ --config_server_port 60088 \

$ python -m lightllm.server.api_server \
$ --model_dir /your/model/path \
$ --run_mode "pd_master" \
$ --host /your/host/ip \
$ --port 60011 \
$ --config_server_host <config_server_host> \
$ --config_server_port <config_server_port>

$ CUDA_VISIBLE_DEVICES=0,1 KV_TRANS_USE_P2P=1 LOADWORKER=1 python -m lightllm.server.api_server \
$ --model_dir /data/model/Qwen2-7B/ \
$ --run_mode "prefill" \
$ --host /your/host/ip \
$ --port 8017 \
$ --tp 2 \
$ --nccl_port 2732 \
$ --max_total_token_num 400000 \
$ --tokenizer_mode fast \
$ --max_req_total_len 16000 \
$ --running_max_req_size 128 \
$ --disable_cudagraph \
$ --config_server_host <config_server_host> \
$ --config_server_port <config_server_port>

$ CUDA_VISIBLE_DEVICES=2,3 KV_TRANS_USE_P2P=1 LOADWORKER=10 python -m lightllm.server.api_server \
$ --model_dir /data/model/Qwen2-7B/ \
$ --run_mode "decode" \
$ --host /your/host/ip \
$ --port 8118 \
$ --nccl_port 12322 \
$ --tp 2 \
$ --max_total_token_num 400000 \
$ --graph_max_len_in_batch 2048 \
$ --graph_max_batch_size 16 \
$ --tokenizer_mode fast \
$ --config_server_host <config_server_host> \
$ --config_server_port <config_server_port>
"""

FILLED_IN = {
    "/your/host/ip": "127.0.0.1",
    "/your/model/path": "/no/such/model",
    "<config_server_host>": "127.0.0.1",
    "<config_server_port>": "60088",
}


def commands():
    """Each command as (environment, arguments)."""
    text = QUICKSTART
    for placeholder, value in FILLED_IN.items():
        text = text.replace(placeholder, value)
    found = []
    for block in text.strip().split("\n\n"):
        words = shlex.split(block.replace("$ ", " ").replace("\\\n", " ").removesuffix("\\"))
        start = words.index("python")
        assert words[start : start + 3] == ["python", "-m", "lightllm.server.api_server"]
        found.append((dict(word.split("=", 1) for word in words[:start]), words[start + 3 :]))
    return found


COMMANDS = commands()
# What each command asks for that this version refuses, in the order above.
NOT_BUILT = [
    [],
    [],
    [],
    [],
    [],
    [],
    [],
    [],
    [],
    [],
    [],
]


@pytest.fixture(params=range(len(COMMANDS)), ids=[f"command{index}" for index in range(len(COMMANDS))])
def command(request, monkeypatch):
    environment, arguments = COMMANDS[request.param]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return request.param, arguments


def test_the_list_is_whole():
    assert len(COMMANDS) == len(NOT_BUILT) == 11


def test_dry_run_passes(command, capsys):
    index, arguments = command
    assert api_server.main([*arguments, "--dry_run"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    report = json.loads(output.out)
    assert [text.split(":")[0] for text in report["not_built"]] == NOT_BUILT[index]
    is_directory = report["run_mode"] == "config_server"
    assert is_directory or any(text.startswith("--model_dir") for text in report["unchecked"])
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag.startswith("--") and value and not value.startswith("--"):
            assert str(report[flag[2:]]) == value


def test_without_dry_run_it_is_refused_by_name_or_the_model_is_missing(command, capsys, monkeypatch):
    index, arguments = command
    launched = []
    monkeypatch.setattr(launch, "launch", lambda config: launched.append(config.server.run_mode) or 0)
    code = api_server.main(arguments)
    errors = capsys.readouterr().err
    if "config_server" in arguments:  # needs no model, and would run now
        assert (code, launched) == (0, ["config_server"])
        return
    assert (code, launched) == (2 if NOT_BUILT[index] else 3, [])
    assert all(f"{flag}: not implemented in this version" in errors for flag in NOT_BUILT[index])


def test_wrong_loadworker_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("LOADWORKER", "eight")
    assert api_server.main(["--dry_run"]) == 2
    assert capsys.readouterr().err.startswith("error: LOADWORKER: got 'eight', allowed an integer in 1..256")
