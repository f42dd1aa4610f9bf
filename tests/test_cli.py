"""The parser against its rules, and `--help` against its snapshot."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightllm import cli
from lightllm.cli import move_secrets, parse
from lightllm.config import FLAGS
from lightllm.errors import ConfigError

SNAPSHOT = Path(__file__).parent / "snapshots" / "help.txt"


def values(*argv, environ=None, **options):
    return parse(argv, environ or {}, **options).values


def refusal(*argv, environ=None, **options):
    with pytest.raises(ConfigError) as caught:
        parse(argv, environ or {}, **options)
    return caught.value.message


def test_help_equals_the_snapshot():
    # After a wanted change: python -m lightllm.server.api_server --help > tests/snapshots/help.txt
    assert cli.format_help() == SNAPSHOT.read_text(encoding="utf-8")
    assert all(f"  --{name}" in cli.format_help() for name in FLAGS)


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from lightllm.server.api_server import main; assert main(['--help']) == 0; "
        "heavy = set('torch numpy starlette zmq tokenizers rich transformers'.split()) & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
        durations.append(time.perf_counter() - start)
        assert run.returncode == 0, run.stderr
        assert "--model_dir" in run.stdout
    # The best of three: another process may hold the core.
    assert min(durations) < 0.5


@pytest.mark.parametrize(
    "argv",
    [
        ["--max_req_total_len", "7"],
        ["--max-req-total-len", "7"],
        ["--max_req-total_len=7"],
        ["--max-req-total-len=+7"],
    ],
)
def test_spellings_of_a_name(argv):
    assert values(*argv) == {"max_req_total_len": 7}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--port", "0"], {"port": 0}),
        (["--mem_fraction", ".5"], {"mem_fraction": 0.5}),
        (["--request_timeout", "0"], {"request_timeout": 0.0}),
        (["--data_type", "bf16"], {"dtype": "bfloat16"}),
        (["--dtype", "fp32", "--data-type=float32"], {"dtype": "float32"}),
        (
            ["--model_name", "a", "--served_model_name", "b", "--model_name", "a"],
            {"served_model_name": ("a", "b")},
        ),
        (["--pd_decode_rpyc_port", "5"], {"kv_port": 5}),
        (["--eos_id", "2", "7", "--port", "1"], {"eos_id": (2, 7), "port": 1}),
        (["--eos_id", "2,7"], {"eos_id": (2, 7)}),
        (["--override_config", '{"a": [1]}'], {"override_config": {"a": [1]}}),
        (["--batch_max_tokens", "auto"], {"batch_max_tokens": 0}),
        (["--pd_master_ip", "none"], {"pd_master_ip": None}),
        (["--disable_overlap"], {"disable_overlap": True}),
        (["--disable_overlap=0"], {"disable_overlap": False}),
        (["--port", "8000", "--port=8000"], {"port": 8000}),
        (["--host", "::1"], {"host": "::1"}),
        (["--nccl_host", "master_addr"], {"nccl_host": "master_addr"}),
        (["--quant_type", "w8"], {"quant_type": "w8"}),
        (["--load_way", "HF", "--port", "1"], {"port": 1}),
        (["--load-way=HF"], {}),
        (["--config_server_store", "etcd://h:2379"], {"config_server_store": "etcd://h:2379"}),
        (["--config_server_store", "etcd://a:1,[::1]:2"], {"config_server_store": "etcd://a:1,[::1]:2"}),
        (["--cors_origins", "*", "--cors_origins", "http://a:1"], {"cors_origins": ("*", "http://a:1")}),
    ],
)
def test_accepted(argv, expected):
    assert values(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "needles"),
    [
        (["--prot", "1"], ["--prot", "did you mean --port"]),
        (["--max_req", "1"], ["--max_req", "no such flag"]),
        (["--tensor_parallel_size", "1"], ["no such flag"]),
        (["--port"], ["--port needs a value"]),
        (["--port", "--host", "a"], ["--port needs a value"]),
        (["--port", "65536"], ["--port", "65536", "0..65535"]),
        (["--port", "-1"], ["-1", "0..65535"]),
        (["--port", "8_000"], ["8_000"]),
        (["--port", "1.0"], ["1.0"]),
        (["--port", "1" * 5000], ["0..65535"]),
        (["--port", ""], ["''"]),
        (["--port", "1", "--port", "2"], ["given twice", "1", "2"]),
        (["--dtype", "fp32", "--data_type", "fp16"], ["--dtype and --data_type", "given twice"]),
        (["--tp", "0"], ["integer >= 1"]),
        (["--mem_fraction", "1"], ["between 0 and 1"]),
        (["--mem_fraction", "nan"], ["nan"]),
        (["--request_timeout", "1e400"], ["1e400"]),
        (["--log_stats_interval", "0"], ["a number > 0"]),
        (["--dtype", "bfloat"], ["did you mean bfloat16"]),
        (["--run_mode", "Normal"], ["normal, prefill"]),
        (["--disable_overlap=yes"], ["1 or 0"]),
        (["--disable_overlap", "1"], ["unexpected argument '1'"]),
        (["model"], ["unexpected argument 'model'"]),
        (["-p", "1"], ["unexpected argument '-p'"]),
        (["--override_config", "[1]"], ["JSON object"]),
        (["--override_config", "{"], ["JSON object"]),
        (["--override_config", "[" * 100000], ["JSON object"]),
        (["--eos_id", "2", "x"], ["--eos_id", "'x'"]),
        (["--eos_id", "2", "--eos_id", "3"], ["given twice"]),
        (["--host", "300.1.1.1"], ["300.1.1.1"]),
        (["--host", "a b"], ["a b"]),
        (["--host", "http://a"], ["http://a"]),
        (["--host", ""], ["printable"]),
        (["--served_model_name", "a\nready: x"], ["printable"]),
        (["--model_dir", "a\udcff"], ["printable"]),
        (["--otlp_endpoint", "collector:4317"], ["http(s)://"]),
        (["--cors_origins", "http://a/b"], ["HOST[:PORT]"]),
        (["--config_server_store", "redis://h"], ["memory or etcd"]),
        (["--config_server_store", "h:2379"], ["memory or etcd"]),
        (["--config_server_store", "etcd://h:2379,"], ["memory or etcd", "'' is not HOST:PORT"]),
        (["--load_way", "DS"], ["--load_way", "only HF"]),
        (["--enable_fa3"], ["--enable_fa3", "--attention_backend"]),
        (["--mode", "triton_int8kv"], ["--mode", "--kv_cache_dtype"]),
        (["--router_token_ratio", "0.5"], ["--router_token_ratio", "--batch_max_tokens"]),
        (["--trust_remote_code"], ["never run"]),
        (["--enable_multimodal"], ["images"]),
        (["--visual_dp", "2"], ["images"]),
        (["--quant_type", "triton-w9"], ["triton-w9"]),
        (["--"], ["--"]),
    ],
)
def test_refused(argv, needles):
    message = refusal(*argv)
    assert all(needle in message for needle in needles), message
    assert len(message) < 400


def test_old_spellings_warn():
    parsed = parse(["--use_dynamic_prompt_cache", "--diverse-mode", "--quant_type", "vllm-fp8w8a8"], {})
    assert parsed.values == {"quant_type": "fp8w8a8"}
    assert [warning.split(":")[0] for warning in parsed.warnings] == [
        "--use_dynamic_prompt_cache",
        "--diverse-mode",
        "--quant_type",
    ]


def test_numeric_host_is_normalised_and_said():
    parsed = parse(["--host", "127.0.01"], {})
    assert parsed.values == {"host": "127.0.0.1"}
    assert parsed.warnings == ["--host: 127.0.01 is read as 127.0.0.1"]


@pytest.mark.parametrize("last", ["\\", " ", ""])
def test_trailing_line_continuation_is_ignored_with_a_warning(last):
    parsed = parse(["--port", "1", last], {})
    assert parsed.values == {"port": 1}
    assert len(parsed.warnings) == 1


def test_model_argument():
    assert values("m", "--port", "1", takes_model=True) == {"model_dir": "m", "port": 1}
    assert values("--port", "1", "m", "--model_dir", "m", takes_model=True) == {"model_dir": "m", "port": 1}
    message = refusal("m", "--model_dir", "other", takes_model=True)
    assert "MODEL and --model_dir" in message
    assert "'other'" in message


def test_environment_sets_flags_and_the_command_line_wins():
    environ = {
        "LIGHTLLM_PORT": "9000",
        "LIGHTLLM_HOST": "0.0.0.0",
        "LIGHTLLM_DISABLE_OVERLAP": "1",
        "LIGHTLLM_STRICT_FIELDS": "0",
        "LIGHTLLM_SERVED_MODEL_NAME": "a, b",
        "LIGHTLLM_LOG_LEVEL": "",
        "LIGHTLLM_HOME": "/x",
    }
    parsed = parse(["--port", "1"], environ)
    assert parsed.values == {
        "port": 1,
        "host": "0.0.0.0",
        "disable_overlap": True,
        "strict_fields": False,
        "served_model_name": ("a", "b"),
    }
    assert parsed.spelled["host"] == "LIGHTLLM_HOST"
    assert parsed.warnings == []


def test_environment_errors_name_the_variable():
    assert refusal(environ={"LIGHTLLM_PORT": "x"}).startswith("LIGHTLLM_PORT: got 'x'")
    assert refusal(environ={"LIGHTLLM_DISABLE_OVERLAP": "true"}).startswith("LIGHTLLM_DISABLE_OVERLAP")


def test_unknown_variables_and_service_links_warn_once_each():
    environ = {
        "LIGHTLLM_PORT": "tcp://10.0.0.1:8000",
        "LIGHTLLM_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "LIGHTLLM_SERVICE_HOST": "10.0.0.1",
        "LIGHTLLM_PROT": "1",
    }
    parsed = parse([], environ)
    assert parsed.values == {}
    links, unknown = parsed.warnings
    assert "LIGHTLLM_PORT, LIGHTLLM_PORT_8000_TCP" in links
    assert "LIGHTLLM_PROT, LIGHTLLM_SERVICE_HOST" in unknown


def test_secrets(tmp_path):
    file = tmp_path / "key"
    file.write_text("from-file\n")
    parsed = parse(["--api_key", f"@{file}", "--api_key", "literal"], {})
    assert parsed.values == {"api_key": ("from-file", "literal")}
    assert len(parsed.warnings) == 1
    assert "LIGHTLLM_API_KEY" in parsed.warnings[0]
    assert "literal" not in parsed.warnings[0]
    assert values(environ={"LIGHTLLM_API_KEY": "a,b"}) == {"api_key": ("a", "b")}
    assert parse([], {"LIGHTLLM_API_KEY": "a"}).warnings == []
    assert "cannot be read" in refusal("--api_key", "@/no/such/file")
    file.write_text("two words")
    assert "words" not in refusal("--api_key", f"@{file}")
    # `none` is the word for "no address" elsewhere; here it is a key like any other.
    assert values("--api_key", "none") == {"api_key": ("none",)}


@pytest.mark.parametrize("secret", ["", "s3cret with space", "s3cret,comma", "s3cr\u00e9t"])
def test_bad_secret_is_refused_without_showing_it(secret):
    message = refusal("--api_key", secret)
    assert not secret or secret not in message


def test_two_different_secrets_are_not_shown():
    message = refusal("--cluster_token", "hunter2", "--cluster_token", "hunter3")
    assert "hunter" not in message


def test_move_secrets():
    argv = ["--api_key", "a", "--port", "1", "--api-key=b", "--cluster_token", "@file", "MODEL"]
    kept, variables = move_secrets(argv, takes_model=True)
    assert kept == ["--port", "1", "--cluster_token", "@file", "MODEL"]
    assert variables == {"LIGHTLLM_API_KEY": "a,b"}
    assert move_secrets(["--port", "1"]) == (["--port", "1"], {})


def test_errors_are_one_block():
    assert cli.format_error(ConfigError("one\ntwo")) == "error: one\n       two"
