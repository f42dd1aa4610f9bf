"""The entry: exit codes, the order of checks, and what a dry run may touch."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lightllm import __version__
from lightllm.errors import BindError
from lightllm.server import api_server, launch

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)


@pytest.fixture
def started(monkeypatch):
    """The configurations that would have been launched."""
    configs = []

    def launch_nothing(config):
        configs.append(config)
        return 0

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(launch, "launch", launch_nothing)
    yield configs
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def dry_run(capsys, *argv):
    assert api_server.main([*argv, "--dry_run"]) == 0
    return json.loads(capsys.readouterr().out)


def test_help_and_version(capsys):
    assert api_server.main(["--no_such_flag", "--help"]) == 0
    assert "--model_dir" in capsys.readouterr().out
    assert api_server.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightllm {__version__}\n"


def test_start_hands_over_a_resolved_configuration(model, started, capsys):
    assert api_server.main(["--model_dir", model, "--port", "0", "--disable_cudagraph"]) == 0
    (config,) = started
    assert config.engine.max_req_total_len == 512
    assert config.model.served_model_name == ("tiny",)
    warning, resolved = capsys.readouterr().err.splitlines()
    assert "WARNING server" in warning
    assert "--disable_cudagraph" in warning
    assert '"max_req_total_len":512' in resolved


def test_secrets_are_masked_in_the_log(model, started, capsys, monkeypatch):
    monkeypatch.setenv("LIGHTLLM_API_KEY", "hunter2")
    assert api_server.main(["--model_dir", model]) == 0
    assert started[0].security.api_key == ("hunter2",)
    assert "hunter2" not in capsys.readouterr().err


def test_exit_codes(model, started, capsys, monkeypatch):
    assert api_server.main(["--port", "x"]) == 2
    assert api_server.main(["--model_dir", "/no/such/model"]) == 3
    assert api_server.main(["--model_dir", model, "--chat_template", "/no/such/file"]) == 2

    def fail(config):
        raise BindError("taken")

    monkeypatch.setattr(launch, "launch", fail)
    assert api_server.main(["--model_dir", model]) == 4
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    assert errors[-1] == "error: taken"


def test_flags_are_judged_before_the_model_is_looked_for(started):
    assert api_server.main(["--model_dir", "/no/such/model", "--dp", "2"]) == 2
    assert started == []


def test_dry_run_knows_the_model(model, capsys):
    report = dry_run(capsys, "--model_dir", model, "--max_req_total_len", "600")
    assert report["max_req_total_len"] == 512
    assert report["warnings"] == ["--max_req_total_len 600: cut to 512, the model's context"]
    assert not any("--model_dir" in text for text in report["unchecked"])
    assert report["not_built"] == []


def test_dry_run_binds_nothing_and_masks_secrets(model, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        report = dry_run(capsys, "--model_dir", model, "--port", str(port), "--api_key", "hunter2")
    assert report["api_key"] == ["***"]
    assert "hunter2" not in json.dumps(report)


def test_dry_run_lists_what_it_could_not_check(capsys):
    report = dry_run(capsys, "--model_dir", "no-org/no-model", "--chat_template", "/no/such/file")
    assert any("--model_dir no-org/no-model" in text for text in report["unchecked"])
    assert any("--chat_template" in text for text in report["unchecked"])


def test_dry_run_lists_a_model_that_would_be_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert any("--model_dir" in text for text in dry_run(capsys, "--model_dir", str(tmp_path))["not_built"])


def test_wrong_dry_run_fails(model, capsys):
    wrong = ["--model_dir", model, "--dry_run"]
    assert api_server.main([*wrong, "--override_config", '{"no_such_key": 1}']) == 2
    assert api_server.main([*wrong, "--tp", "8"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "--tp 8" in output.err


def test_secrets_leave_the_command_line():
    code = (
        "import sys; from lightllm.server.api_server import hide_secrets; hide_secrets(sys.argv[1:]); "
        "import os; print(open('/proc/self/cmdline').read().split(chr(0))[3:], "
        "os.environ['LIGHTLLM_API_KEY'])"
    )
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("no /proc")
    given = ["--port", "1", "--api_key", "hunter2", "--api_key=hunter3", "--tp", "1"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LIGHTLLM_")}
    run = subprocess.run(
        [sys.executable, "-c", code, *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout == "['--port', '1', '--tp', '1', ''] hunter2,hunter3\n"
    assert "warning: --api_key: every user of this machine" in run.stderr
    assert "the variable LIGHTLLM_API_KEY\n" in run.stderr
    assert "hunter" not in run.stderr


def test_nothing_is_executed_without_secrets(monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("must not start anew"))
    api_server.hide_secrets(["--port", "1"])
    api_server.hide_secrets(["--api_key", "hunter2", "--dry_run"])
    api_server.hide_secrets(["--api_key", "hunter2", "--no_such_flag"])
