"""`resolve` on machines and models that need not exist."""

import msgspec
import pytest

from lightllm.cli import parse
from lightllm.config import FLAGS
from lightllm.env import Environment
from lightllm.errors import ConfigError
from lightllm.flag import BUILT_STAGES
from lightllm.resolution import Machine, resolve
from tests.fakes import SMOLLM2

CPU = Machine(num_cores=8, num_physical_cores=4, num_gpus=0)
GPU = Machine(num_cores=8, num_physical_cores=4, num_gpus=2)


def run(line="", *, machine=CPU, model=SMOLLM2, environment=None, environ=None):
    args = parse(line.split(), environ or {})
    return resolve(args, environment or Environment(), machine, model)


def refusal(line, **options):
    with pytest.raises(ConfigError) as caught:
        run(line, **options)
    assert caught.value.exit_code == 2
    return caught.value.message


def test_defaults_on_a_cpu():
    result = run()
    config = result.config
    assert config.engine.device == "cpu"
    assert (config.engine.batch_max_tokens, config.engine.chunked_prefill_size) == (128, 128)
    assert config.engine.max_req_total_len == 8192
    assert config.engine.max_total_token_num is None
    assert config.model.served_model_name == ("smollm2-135m",)
    assert config.parallel.multinode_port == 28766
    assert config.graph.graph_max_len_in_batch == 8192
    assert config.environment.omp_num_threads == 4
    assert (result.warnings, result.not_built) == ([], [])
    assert result.unchecked == ["--device auto: no GPU is visible, so nothing about GPUs was checked"]


@pytest.mark.parametrize(
    ("path", "name"),
    [("/m/Llama-2-7b/", "Llama-2-7b"), ("a.gguf", "a"), ("org/name", "name"), (".", "model"), ("~", "model")],
)
def test_served_name_is_the_last_part_of_the_path(path, name):
    assert run(f"--model_dir {path}").config.model.served_model_name == (name,)
    assert run(f"--model_dir {path} --model_name x").config.model.served_model_name == ("x",)


def test_length_is_cut_to_the_model_and_to_the_pool():
    assert run().warnings == []
    explicit = run("--max_req_total_len 10000")
    assert explicit.config.engine.max_req_total_len == 8192
    assert explicit.warnings == ["--max_req_total_len 10000: cut to 8192, the model's context"]
    scaled = msgspec.structs.replace(SMOLLM2, rope_scaling={"rope_type": "dynamic", "factor": 1.5})
    assert run("--max_req_total_len 10000", model=scaled).config.engine.max_req_total_len == 10000
    assert run("--max_req_total_len 20000", model=scaled).config.engine.max_req_total_len == 12288
    pool = run("--max_req_total_len 8000 --max_total_token_num 600")
    assert pool.config.engine.max_req_total_len == 600
    assert pool.config.engine.running_max_req_size == 600
    assert "--max_total_token_num" in pool.warnings[0]
    assert run("--max_req_total_len 100").config.engine.max_req_total_len == 100
    assert run(model=None).config.engine.max_req_total_len == 16384


def test_step_budget():
    assert run("--batch_max_tokens 64").config.engine.chunked_prefill_size == 64
    cut = run("--batch_max_tokens 64 --chunked_prefill_size 100")
    assert cut.config.engine.chunked_prefill_size == 64
    assert len(cut.warnings) == 1
    whole = run("--disable_chunked_prefill").config.engine
    assert (whole.batch_max_tokens, whole.chunked_prefill_size) == (8192, 8192)
    assert run("--disable_chunked_prefill --batch_max_tokens 9000").config.engine.batch_max_tokens == 9000
    assert len(run("--disable_chunked_prefill --chunked_prefill_size 5").warnings) == 1


def test_whole_prompts_need_room_in_a_step():
    message = refusal("--disable_chunked_prefill --batch_max_tokens 100")
    assert "--batch_max_tokens 100" in message
    assert "--disable_chunked_prefill" in message
    assert "8192" in message
    refusal("--disable_chunked_prefill --batch_max_tokens 100 --max_req_total_len 200", model=None)
    # The limit may still be cut to the model's context, so it is not judged without the model.
    unknown = run("--disable_chunked_prefill --batch_max_tokens 8192", model=None)
    assert any("--batch_max_tokens" in text for text in unknown.unchecked)


def test_gpu_defaults():
    config = run(machine=GPU).config
    assert (config.engine.device, config.engine.batch_max_tokens, config.engine.chunked_prefill_size) == (
        "cuda",
        4096,
        4096,
    )
    message = refusal("--tp 4", machine=GPU)
    assert "--tp 4" in message
    assert "--nnodes 1" in message
    assert run("--tp 4 --nnodes 2 --nccl_host 10.0.0.1", machine=GPU).config.environment.omp_num_threads == 2


def test_a_visible_gpu_is_used_unless_told_otherwise():
    for line in ("", "--device cuda"):
        result = run(line, machine=GPU)
        assert result.config.engine.device == "cuda"
        assert result.warnings == []
    assert run("--device cpu", machine=GPU).config.engine.device == "cpu"
    assert run("--disable_cudagraph --attention_backend triton", machine=GPU).warnings == []
    crippled = msgspec.structs.replace(GPU, gpu_obstacle="triton is not installed")
    result = run("", machine=crippled)
    assert result.config.engine.device == "cpu"
    assert "triton is not installed" in result.warnings[0]
    assert "triton is not installed" in refusal("--device cuda", machine=crippled)
    assert run("--attention_backend flashinfer", machine=GPU).warnings == []
    assert "no GPU" in refusal("--device cuda")
    assert "no GPU" in refusal("--device cuda --dry_run")


# One value other than the default for every reserved flag.
RESERVED = {
    "kv_cache_dtype": "int8",
    "httpserver_workers": "2",
    "long_truncation_mode": "head",
    "enable_deterministic": None,
    "dp": "2",
    "moe_mode": "ep",
    "mtp_mode": "deepseekv3",
    "mtp_step": "1",
    "mtp_draft_model_dir": "d",
    "output_constraint_mode": "none",
    "tool_call_parser": "none",
    "reasoning_parser": "none",
    "otlp_endpoint": "http://c:4317",
    "cors_origins": "*",
}


def test_the_list_of_reserved_flags_is_complete():
    stages = {spec.name: spec.flag.stage for spec in FLAGS.values() if spec.section != "graph"}
    assert {name for name, stage in stages.items() if stage not in BUILT_STAGES} == set(RESERVED)


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_flag_is_refused_by_name(name):
    value = RESERVED[name]
    message = refusal(f"--{name}" if value is None else f"--{name} {value}")
    assert f"--{name}: not implemented in this version" in message
    assert "secret" not in message or "a secret" in message
    assert "secret-token" not in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("quant_type", "w8a8"),
    ],
)
def test_reserved_value_of_a_built_flag_is_refused(flag, value):
    assert refusal(f"--{flag} {value}").startswith(f"--{flag}: not implemented in this version (got {value}")


def test_reserved_flag_may_have_its_default():
    skipped = ("enable_deterministic", "cors_origins")
    line = " ".join(f"--{name} {FLAGS[name].default_text}" for name in RESERVED if name not in skipped)
    result = run(f"{line} --advertise_host 127.0.0.1")
    assert (result.not_built, result.warnings) == ([], [])


def test_dry_run_lists_what_is_refused():
    result = run(
        "--dry_run --tp 8 --quant-type w8a8 --model-name x --kv-cache-dtype int8",
        environ={"LIGHTLLM_DP": "2"},
    )
    assert [text.split(":")[0] for text in result.not_built] == [
        "--quant_type",
        "--kv_cache_dtype",
        "--dp",
    ]
    assert "from LIGHTLLM_DP" in result.not_built[2]
    assert "from" not in result.not_built[0]


def test_all_refusals_come_at_once():
    assert len(refusal("--dp 2 --moe_mode ep").splitlines()) == 2


def test_graph_flags_on_a_cpu_are_one_warning():
    result = run("--disable_cudagraph --graph_max_batch_size 16 --graph_max_len_in_batch 2048")
    assert len(result.warnings) == 1
    assert "--disable_cudagraph, --graph_max_batch_size, --graph_max_len_in_batch" in result.warnings[0]
    assert result.config.graph.graph_max_len_in_batch == 2048


MASTER = "--pd_master_ip 10.0.0.1"
DIRECTORY = "--config_server_host 10.0.0.1 --config_server_port 60088"


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("--tp 3 --nnodes 2", ["--tp 3", "--nnodes 2"]),
        ("--tp 2 --nnodes 2 --node_rank 2", ["--node_rank 2", "--nnodes 2", "0..1"]),
        ("--tp 4 --dp 3", ["--tp 4", "--dp 3"]),
        ("--tp 10", ["--tp 10", "--model_dir", "1..9"]),
        ("--tp 2 --nnodes 2 --node_rank 1 --port 8001", ["--port", "--node_rank 1", "machine 0"]),
        ("--mtp_mode deepseekv3", ["--mtp_mode", "--mtp_step"]),
        ("--mtp_step 1", ["--mtp_mode", "--mtp_step"]),
        ("--quant_type fp8w8a8", ["--quant_type fp8w8a8", "--device auto"]),
        ("--run_mode prefill", ["--run_mode prefill", "--pd_master_ip", "--config_server_host"]),
        ("--run_mode decode --pd_master_ip none", ["--pd_master_ip", "none is given"]),
        (f"--run_mode decode {MASTER} {DIRECTORY}", ["both ways", "--pd_master_ip", "--config_server_host"]),
        (
            "--run_mode pd_master --config_server_host h",
            ["--config_server_host alone", "--config_server_port"],
        ),
        ("--run_mode config_server", ["--run_mode config_server", "--config_server_host"]),
        (f"--run_mode config_server {DIRECTORY} --port 1", ["--port", "--run_mode config_server"]),
        (
            f"--run_mode pd_master {DIRECTORY} --config_server_store etcd://e:2379",
            ["--config_server_store etcd://e:2379", "--run_mode pd_master"],
        ),
        (f"--run_mode prefill {MASTER} --tp 2 --nnodes 2", ["--run_mode prefill", "--nnodes 2"]),
        (
            "--running_max_req_size 10 --max_total_token_num 9",
            ["--running_max_req_size 10", "--max_total_token_num 9"],
        ),
    ],
)
def test_cross_rules_name_both_flags(line, flags):
    message = refusal(f"{line} --dry_run")
    assert all(flag in message for flag in flags), message


@pytest.mark.parametrize(
    "line",
    [
        f"--run_mode prefill {MASTER} --pd_master_port 60011",
        f"--run_mode decode {DIRECTORY}",
        f"--run_mode pd_master {DIRECTORY}",
        "--run_mode pd_master",
        f"--run_mode config_server {DIRECTORY}",
        f"--run_mode config_server {DIRECTORY} --config_server_store etcd://e:2379,f:2379",
    ],
)
def test_lines_that_are_right(line):
    assert run(line, model=None).not_built == []


def test_draft_layers_are_checked_before_they_are_built():
    assert run("--mtp_mode deepseekv3 --mtp_step 1 --dry_run", model=None).not_built


def test_several_machines():
    result = run("--tp 16 --nnodes 2 --node_rank 1 --nccl_host 10.0.0.1 --dry_run", model=None)
    assert result.not_built == []
    assert "--nccl_host 10.0.0.1: not contacted" in result.unchecked


def test_one_machine_needs_no_port():
    assert "--nccl_port: no effect with one machine" in run("--tp 2 --nccl_port 2732").warnings[0]
    assert run("--tp 2").warnings == []


def test_peers_are_not_contacted():
    assert "--pd_master_ip 10.0.0.1: not contacted" in run(f"--run_mode decode {MASTER} --dry_run").unchecked
    assert not any(
        "contacted" in text for text in run(f"--run_mode config_server {DIRECTORY} --dry_run").unchecked
    )
    line = f"--run_mode config_server {DIRECTORY} --config_server_store etcd://e:2379 --dry_run"
    assert "--config_server_store etcd://e:2379: not contacted" in run(line).unchecked


def test_open_server_without_key_is_warned_about():
    assert "--api_key" in run("--host 0.0.0.0").warnings[0]
    assert run("--host 0.0.0.0", environ={"LIGHTLLM_API_KEY": "k"}).warnings == []
    assert run("--host 127.1.2.3").warnings == []


def test_weights_are_quantised_on_a_cpu_only():
    for quant_type in ("w8", "w4"):
        assert run(f"--quant_type {quant_type}").config.model.quant_type == quant_type
        assert run(f"--quant_type {quant_type} --device cpu", machine=GPU).config.engine.device == "cpu"
        message = refusal(f"--quant_type {quant_type}", machine=GPU)
        assert message.startswith(f"--quant_type {quant_type} and --device auto (here a GPU)")


def test_drafts_are_verified_on_a_cpu_only():
    assert run("--draft_ngram 5").config.parallel.draft_ngram == 5
    assert refusal("--draft_ngram 5", machine=GPU).startswith(
        "--draft_ngram 5 and --device auto (here a GPU)"
    )


def test_advertised_address():
    assert run().config.server.advertise_host == "127.0.0.1"
    assert run("--host ::").config.server.advertise_host is None


def test_environment():
    ep = Environment(moe_mode="ep")
    assert "from MOE_MODE" in refusal("", environment=ep)
    assert run("--moe_mode tp", environment=ep).config.parallel.moe_mode == "tp"
    p2p = run("--dry_run --kv_transport tcp", environment=Environment(kv_trans_use_p2p=True))
    assert any("KV_TRANS_USE_P2P" in text for text in p2p.warnings)
    threads = run(environment=Environment(omp_num_threads=3)).config.environment
    assert threads.omp_num_threads == 3
    assert run("--tp 8 --dry_run").config.environment.omp_num_threads == 1
