"""Environment variables that are no flags."""

import pytest

from lightllm.env import VARIABLES, Environment, read_environment
from lightllm.errors import ConfigError


def test_defaults():
    environment = read_environment({"HOME": "/home/u"}, num_cores=64)
    assert environment.loadworker == 8
    assert environment.kv_trans_use_p2p is None
    assert environment.omp_num_threads == 0
    assert environment.home.endswith("/.lightllm")
    assert not environment.home.startswith("~")
    assert read_environment({}, num_cores=2).loadworker == 2


def test_values():
    environ = {
        "LOADWORKER": "18",
        "KV_TRANS_USE_P2P": "0",
        "MOE_MODE": "EP",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "LIGHTLLM_HOME": "/data/l",
        "OMP_NUM_THREADS": "4,2",
    }
    assert read_environment(environ, num_cores=2) == Environment(
        loadworker=18,
        kv_trans_use_p2p=False,
        moe_mode="ep",
        cuda_visible_devices="0,1",
        home="/data/l",
        omp_num_threads=4,
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LOADWORKER", "0"),
        ("LOADWORKER", "257"),
        ("LOADWORKER", "-1"),
        ("LOADWORKER", "8.0"),
        ("LOADWORKER", "many"),
        ("LOADWORKER", " 8"),
        ("LOADWORKER", "\u0668"),
        ("LOADWORKER", "9" * 5000),
        ("KV_TRANS_USE_P2P", "yes"),
        ("MOE_MODE", "DP"),
        ("OMP_NUM_THREADS", "none"),
    ],
)
def test_wrong_values_name_the_variable(name, text):
    with pytest.raises(ConfigError) as caught:
        read_environment({name: text}, num_cores=2)
    assert caught.value.message.startswith(f"{name}: got")
    assert caught.value.exit_code == 2


def test_every_variable_is_documented():
    documented = " ".join(variable.name for variable in VARIABLES)
    for name in (
        "LOADWORKER",
        "KV_TRANS_USE_P2P",
        "MOE_MODE",
        "CUDA_VISIBLE_DEVICES",
        "LIGHTLLM_HOME",
        "OMP_NUM_THREADS",
    ):
        assert name in documented
