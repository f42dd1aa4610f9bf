"""The flag table: complete, consistent, and safe to send and to show."""

import math

import msgspec
import pytest

from lightllm.config import FLAGS, Config, SecuritySection, config_from, decode_config, encode_config
from lightllm.env import Environment
from lightllm.flag import MAX_INT

# The contract: section, then flags in order.
SECTIONS = {
    "model": "model_dir load_format override_config tokenizer_dir tokenizer_mode dtype quant_type "
    "kv_cache_dtype served_model_name eos_id generation_config chat_template",
    "server": "run_mode host advertise_host port httpserver_workers max_request_bytes strict_fields dry_run "
    "max_queued_requests request_timeout drain_timeout",
    "engine": "device max_total_token_num mem_fraction max_req_total_len running_max_req_size "
    "batch_max_tokens chunked_prefill_size schedule_policy disable_overlap restart_policy "
    "disable_chunked_prefill disable_dynamic_prompt_cache long_truncation_mode attention_backend "
    "enable_deterministic",
    "graph": "disable_cudagraph graph_max_batch_size graph_split_batch_size graph_grow_step_size "
    "graph_max_len_in_batch",
    "parallel": "tp nnodes node_rank nccl_host nccl_port multinode_port dp moe_mode mtp_mode mtp_step "
    "mtp_draft_model_dir draft_ngram",
    "pd": "pd_master_ip pd_master_port kv_transport kv_port",
    "config_server": "config_server_store config_server_host config_server_port",
    "output": "output_constraint_mode tool_call_parser reasoning_parser",
    "observability": "log_format log_level log_stats_interval disable_log_stats otlp_endpoint cors_origins "
    "debug_ring",
    "security": "api_key cluster_token",
}


def test_table_holds_every_flag_of_the_contract_in_order():
    by_section = {}
    for spec in FLAGS.values():
        by_section.setdefault(spec.section, []).append(spec.name)
    assert by_section == {section: names.split() for section, names in SECTIONS.items()}


@pytest.mark.parametrize("spec", FLAGS.values(), ids=list(FLAGS))
def test_row_is_consistent(spec):
    flag = spec.flag
    assert flag.stage in ("S", "G", "T", "P", "D", "A", "-")
    assert flag.help
    assert spec.default_text
    assert set(dict(flag.choice_stages)) <= set(flag.choices)
    assert set(dict(flag.synonyms).values()) <= set(flag.choices)
    if flag.choices:
        assert spec.default in flag.choices
    if spec.value_type in (int, float) and spec.default_text != flag.unset and not spec.is_many:
        assert flag.low <= spec.default <= flag.high


def test_no_name_is_used_twice():
    names = [name for spec in FLAGS.values() for name in (spec.name, *spec.flag.aliases)]
    assert len(names) == len(set(names))


def test_defaults_are_those_of_the_contract():
    config = Config()
    assert config.model.model_dir == "smollm2-135m"
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8000)
    assert config.server.max_request_bytes == 16777216
    assert (config.server.request_timeout, config.server.drain_timeout) == (1800, 25)
    assert (config.engine.max_req_total_len, config.engine.running_max_req_size) == (16384, 1000)
    assert (config.parallel.nccl_port, config.pd.pd_master_port) == (28765, 1212)
    assert config.graph.graph_max_batch_size == 256
    assert config.security.api_key == ()


def test_config_survives_json_and_msgpack():
    values = {
        "override_config": {"num_hidden_layers": 2},
        "eos_id": (2, 7),
        "served_model_name": ("a", "b"),
        "max_total_token_num": 4096,
        "api_key": ("k1",),
    }
    config = config_from(values, Environment(loadworker=3, kv_trans_use_p2p=True, omp_num_threads=2))
    assert decode_config(encode_config(config)) == config
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config


def test_unknown_fields_are_refused_on_decoding():
    with pytest.raises(msgspec.ValidationError):
        decode_config(b'{"server": {"prot": 1}}')


def test_secrets_are_shown_nowhere():
    config = config_from({"api_key": ("hunter2", "hunter3"), "cluster_token": "hunter4"}, Environment())
    assert "hunter" not in repr(config)
    assert "hunter" not in str(config.security)
    flags = config.flags()
    assert flags["api_key"] == ["***", "***"]
    assert flags["cluster_token"] == "***"
    assert list(flags) == list(FLAGS)
    assert Config().flags()["cluster_token"] is None
    assert repr(SecuritySection()) == "SecuritySection(api_key=None, cluster_token=None)"


def test_sections_are_frozen():
    with pytest.raises(AttributeError):
        Config().observability.log_level = "debug"


def test_open_ranges_and_limits_are_finite():
    assert all(math.isfinite(spec.flag.low) and spec.flag.high <= MAX_INT for spec in FLAGS.values())
