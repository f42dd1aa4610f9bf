"""What `lightllm doctor` says, check by check, on a machine made up for the test."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from lightllm import __main__
from lightllm.server import doctor
from lightllm.server.doctor import FAIL, OK, WARN, Finding


def case(*argv, **environ):
    """The case of a command line, whose flags must be usable."""
    made, findings = doctor.read_flags(argv, environ)
    assert FAIL not in [finding.status for finding in findings]
    return made


def only(check, given):
    """The one finding of a check."""
    (finding,) = check(given)
    return finding


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_lines_are_aligned_and_end_with_the_remedy():
    assert str(Finding("port", OK, "free")) == "ok    port           free"
    assert (
        str(Finding("port", FAIL, "taken", "choose another")) == "fail  port           taken; choose another"
    )


def test_bad_flags_are_findings_and_defaults_stand_in():
    made, findings = doctor.read_flags(["--no_such_flag", "3"], {})
    assert [finding.status for finding in findings] == [FAIL]
    assert "--no_such_flag" in findings[0].text
    assert made.config.server.port == 8000
    _, findings = doctor.read_flags(["--config_server_host", "h"], {})
    assert any(f.status == FAIL and "--config_server_host" in f.text for f in findings)


def test_usable_flags_and_their_warnings(tmp_path):
    _, findings = doctor.read_flags(["--port", "0"], {})
    assert (findings[0].status, findings[0].text) == (OK, "1 given, all usable")
    _, findings = doctor.read_flags(["--host", "0.0.0.0"], {})
    assert [finding.status for finding in findings] == [WARN]
    assert "--api_key" in findings[0].text


def test_the_machine(monkeypatch):
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: frozenset({"avx2", "sse"}))
    monkeypatch.setattr(doctor.machine, "available_memory_bytes", lambda: doctor.GIB)
    cores, memory = doctor.check_machine(case())
    assert cores.status == OK
    assert cores.text.endswith("cores, avx2")
    assert (memory.status, memory.remedy) == (WARN, "end other programs")
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: frozenset())
    assert next(iter(doctor.check_machine(case()))).status == WARN


def test_packages(monkeypatch):
    versions = {"alpha": "2.9.1+cpu", "beta": "1.10"}

    def version(name):
        if name not in versions:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    lines = ["alpha<2.14,>=2.11", "beta>=1.9", "gamma", 'delta>=1; extra == "dev"']
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    python, packages = doctor.check_packages(case())
    assert python.status == OK
    assert packages.status == FAIL
    assert packages.text == "alpha 2.9.1+cpu is not <2.14,>=2.11, gamma is missing"
    assert "pip install" in packages.remedy
    versions |= {"alpha": "2.11.0", "gamma": "0.1"}
    assert list(doctor.check_packages(case()))[1].text == "alpha 2.11.0, beta 1.10, gamma 0.1"


@pytest.mark.parametrize(
    ("version", "bounds", "is_within"),
    [
        ("2.11", ">=2.11.0,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.13.9.dev1", "<2.14", True),
        ("3", "", True),
        ("3", "!=3", True),
    ],
)
def test_version_bounds(version, bounds, is_within):
    assert doctor._is_within(version, bounds) == is_within


def test_torch(monkeypatch):
    done = subprocess.CompletedProcess([], 0, "2.13.0 13.0 NVIDIA_H100\n", "")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: done)
    assert only(doctor.check_torch, case()).text == "2.13.0, CUDA 13.0, sees NVIDIA H100"
    done.stdout = "2.13.0+cpu -\n"
    monkeypatch.setattr(doctor.machine, "installed_gpus", lambda: 0)
    assert only(doctor.check_torch, case()).status == OK
    monkeypatch.setattr(doctor.machine, "installed_gpus", lambda: 1)
    assert only(doctor.check_torch, case()).status == WARN
    done.returncode, done.stderr = 1, "Traceback\nImportError: libfoo.so is missing\n"
    finding = only(doctor.check_torch, case())
    assert (finding.status, finding.text) == (FAIL, "cannot be imported: ImportError: libfoo.so is missing")


def test_gpu_driver_and_mps(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.machine, "installed_gpus", lambda: 0)
    assert only(doctor.check_gpu, case()).text == "no NVIDIA GPU: the CPU computes"
    monkeypatch.setattr(doctor.machine, "installed_gpus", lambda: 2)
    monkeypatch.setattr(doctor.machine, "gpu_obstacle", lambda: "")
    driver = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n"
    monkeypatch.setattr(doctor, "_read", lambda path: driver)
    environ = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    gpu, mps = doctor.check_gpu(case(**environ))
    assert gpu.text == "1 of 2 visible, driver 580.82.07"
    assert mps.text == "off"
    (tmp_path / "control").touch()
    assert list(doctor.check_gpu(case(**environ)))[1].text == "on"
    monkeypatch.setattr(doctor.machine, "gpu_obstacle", lambda: "triton is not installed")
    assert list(doctor.check_gpu(case(**environ)))[2].text == "not used: triton is not installed"
    monkeypatch.setattr(doctor, "_read", lambda path: "")
    assert next(iter(doctor.check_gpu(case()))).status == FAIL


@pytest.mark.parametrize(("free", "status"), [(64 * 1024**2, WARN), (doctor.GIB, OK)])
def test_shared_memory(monkeypatch, free, status):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    finding = only(doctor.check_shared_memory, case())
    assert finding.status == status
    assert ("--shm-size" in finding.remedy) == (status == WARN)


def write_model(folder: Path, **changes):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_the_model_folder(tmp_path, monkeypatch):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 4096)
    model, tokenizer = doctor.check_model(case("--model_dir", str(tmp_path)))
    assert model.status == OK
    assert "LlamaForCausalLM, 2 layers of 64, vocabulary 300" in model.text
    assert (tokenizer.name, tokenizer.status, tokenizer.remedy) == (
        "tokenizer",
        FAIL,
        "name one with --tokenizer_dir",
    )
    monkeypatch.setattr(doctor.machine, "total_memory_bytes", lambda: 4000)
    sizes = [f for f in doctor.check_model(case("--model_dir", str(tmp_path))) if f.name == "model size"]
    assert [f.status for f in sizes] == [FAIL]


def test_missing_and_remote_models(tmp_path, monkeypatch):
    missing = only(doctor.check_model, case("--model_dir", str(tmp_path / "nowhere")))
    assert missing.status == FAIL
    assert "no such path" in missing.text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    remote = only(doctor.check_model, case("--model_dir", "some-org/some-model"))
    assert (remote.status, remote.remedy) == (WARN, "the server will try to download it")


def test_the_port(listener):
    taken = only(doctor.check_port, case("--port", str(listener)))
    assert taken.status == FAIL
    assert f"127.0.0.1:{listener}" in taken.text
    assert only(doctor.check_port, case("--port", "0")).status == OK


def answers(*findings):
    return tuple(lambda given, finding=finding: iter([finding]) for finding in findings)


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (WARN, 0), (FAIL, 1)])
def test_exit_codes_and_json(monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "CHECKS", answers(Finding("x", status, "text", "remedy")))
    for name in [name for name in os.environ if name.startswith("LIGHTLLM_")]:
        monkeypatch.delenv(name)
    assert doctor.main(["--port", "0"]) == code
    assert f"{status:<5} x              text; remedy" in capsys.readouterr().out
    assert __main__.main(["doctor", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    assert report["checks"][-1] == {"name": "x", "status": status, "text": "text", "remedy": "remedy"}


def test_help(capsys):
    assert doctor.main(["--help"]) == 0
    assert "lightllm doctor" in capsys.readouterr().out


def test_every_check_runs_here(capsys):
    """The real thing on the machine of the test; what it finds depends on the machine."""
    assert doctor.main(["--port", "0", "--json"]) in (0, 1)
    names = {check["name"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"flags", "machine", "memory", "python", "packages", "torch", "gpu", "shared memory"} <= names
    assert {"model", "port", "cluster token"} <= names
