"""`lightllm bench` from flags to exit code, against a server of fixed answers."""

import ast
import io
import json
import os
import signal
import socket

import pytest

from lightllm.bench import cli
from lightllm.bench.progress import progress_view
from tests.bench.fake_server import (
    ROUTES,
    FakeServer,
    chunked,
    generate,
    native_frames,
    openai_frames,
    whole,
)

SMALL = ["--input_num", "6", "--num_clients", "3", "--input_len", "20", "--output_len", "4", "--warmup", "2"]
ERROR_FRAME = (
    b'data:{"token":{"id":null,"text":"","count_output_tokens":2},"finished":true,"finish_reason":"error",'
    b'"error":{"message":"decode node lost","type":"server_error","param":null,"code":"node_lost"},'
    b'"message":"decode node lost"}\n\n'
)
OPENAI_ERROR_FRAME = (
    b'data: {"choices":[{"index":0,"text":"","finish_reason":"error"}],'
    b'"error":{"message":"engine down","code":"engine_down"},"message":"engine down"}\n\n'
)


def run(capsys, *argv):
    """Exit code, the printed dictionary (None if there is none), stdout and stderr."""
    code = cli.main(argv)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("{'backend'")]
    return code, ast.literal_eval(lines[0]) if lines else None, out, err


@pytest.mark.parametrize(
    ("api", "path"),
    [
        ("lightllm", "/generate_stream"),
        ("openai", "/v1/completions"),
        ("openai_chat", "/v1/chat/completions"),
    ],
)
def test_both_families_are_counted_by_the_server(capsys, api, path):
    with FakeServer() as server:
        code, summary, out, _ = run(capsys, *SMALL, "--server_api", api, "--url", server.url)
    assert code == 0
    asked = [
        r.body.get("max_tokens") or r.body["parameters"]["max_new_tokens"]
        for r in server.requests
        if r.path == path
    ]
    assert len(asked) == 8  # two of them to warm up
    assert summary["request_num"] == 6
    assert summary["Avg Output Length"] == sum(asked[2:]) / 6
    assert summary["Avg Input Length"] == 20
    assert summary["input_length_differences"] == {}
    assert summary["wrong_output_lengths"] == []
    assert summary["cached_prompt_tokens"] == (0 if api == "lightllm" else 18)
    assert summary["server"] == "lightllm 9.9, model tiny"
    assert "valid num = 6; all data num = 6; valid ratio = 1.0" in out
    assert server.max_open_streams <= 3


def test_requests_are_greedy_and_ignore_the_end_token(capsys):
    with FakeServer() as server:
        run(capsys, *SMALL, "--url", server.url)
        run(capsys, *SMALL, "--url", server.url, "--server_api", "openai_chat", "--model", "mine")
    native = next(r for r in server.requests if r.path == "/generate_stream").body["parameters"]
    assert (native["do_sample"], native["ignore_eos"]) == (False, True)
    chat = next(r for r in server.requests if r.path == "/v1/chat/completions").body
    assert (chat["temperature"], chat["ignore_eos"], chat["stream"], chat["model"]) == (0, True, True, "mine")
    assert chat["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (lambda r: whole({"message": "queue full"}, 429), "status", "HTTP 429: queue full"),
        (lambda r: chunked(native_frames(4, 20)[:2], is_cut=True), "cut", "closed the connection"),
        (lambda r: chunked(native_frames(4, 20)[:2]), "cut", "after 2 tokens without a last frame"),
        (
            lambda r: chunked([*native_frames(4, 20)[:2], ERROR_FRAME]),
            "error_frame",
            "decode node lost (node_",
        ),
        (lambda r: chunked([b"data:{broken\n\n"]), "bad_answer", "a frame is not as agreed"),
        (lambda r: chunked([]), "cut", "after 0 tokens"),
        (lambda r: iter([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"]), "timeout", "within 0.4 s"),
    ],
)
def test_a_failed_request_is_counted_and_the_run_goes_on(capsys, answer, kind, message):
    def sometimes(request):
        return answer(request) if server.paths().count("/generate_stream") % 3 == 0 else generate(request)

    with FakeServer({"/generate_stream": sometimes}) as server:
        code, summary, out, _ = run(capsys, *SMALL, "--warmup", "0", "--url", server.url, "--timeout", "0.4")
    assert code == 1
    assert summary["request_num"] == 4
    assert list(summary["failures"]) == [kind]
    assert summary["failures"][kind]["count"] == 2
    assert message in summary["failures"][kind]["examples"][0]
    assert f"failures: {kind} 2" in out


@pytest.mark.parametrize(
    ("frames", "kind", "message"),
    [
        ([*openai_frames(4, 20, is_chat=False)[:1], OPENAI_ERROR_FRAME], "error_frame", "engine down"),
        (openai_frames(4, 20, is_chat=False)[:-1], "cut", "without a last frame"),
        ([*openai_frames(4, 20, is_chat=False)[:3], b"data: [DONE]\n\n"], "bad_answer", "no usage"),
    ],
)
def test_failures_of_openai_streams(capsys, frames, kind, message):
    with FakeServer({"/v1/completions": lambda request: chunked(frames)}) as server:
        code, summary, _, err = run(capsys, *SMALL, "--server_api", "openai", "--url", server.url)
    assert code == 1
    assert summary["failures"][kind]["count"] == 6
    assert message in summary["failures"][kind]["examples"][0]
    assert f"warm-up failed: {kind}" in err


def test_a_wrong_length_is_listed(capsys):
    with FakeServer({"/generate_stream": lambda request: chunked(native_frames(3, 25))}) as server:
        code, summary, out, _ = run(
            capsys, *SMALL, "--fixed_output_len", "--output_len=5", "--url", server.url
        )
    assert code == 0
    assert summary["Avg Output Length"] == 3
    assert {"request": 0, "asked": 5, "got": 3} in summary["wrong_output_lengths"]
    assert "wrong output lengths: 6 requests" in out
    assert summary["input_length_differences"] == {"count": 6, "smallest": 5, "largest": 5}
    assert "6 requests differ from the 20 tokens asked, by +5" in out


def test_arrivals_at_a_rate(capsys):
    with FakeServer() as server:
        code, summary, _, _ = run(capsys, *SMALL, "--input_qps", "50", "--url", server.url)
    assert (code, summary["request_num"]) == (0, 6)
    assert summary["duration_s"] > 0.02


def test_the_same_seed_sends_the_same_prompts(capsys):
    def sent(seed):
        with FakeServer() as server:
            run(capsys, *SMALL, "--seed", seed, "--url", server.url)
        return sorted(
            (r.body["inputs"], r.body["parameters"]["max_new_tokens"])
            for r in server.requests
            if r.path == "/generate_stream"
        )

    assert sent("1") == sent("1") != sent("2")


def test_dump_file_is_written_then_shown_then_overwritten(capsys, tmp_path):
    path = tmp_path / "result.json"
    flags = [*SMALL, "--dump_file", str(path)]
    with FakeServer() as server:
        assert run(capsys, *flags, "--url", server.url)[0] == 0
        first = json.loads(path.read_text())
        assert first["request_num"] == 6
        assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
        num_requests = len(server.requests)
        code, _, out, _ = run(capsys, *flags, "--url", server.url)
        assert code == 0
        assert out.splitlines()[0] == f"not run: {path} exists"
        assert json.loads(out.split("\n", 1)[1]) == first
        assert len(server.requests) == num_requests
        assert run(capsys, *flags, "--overwrite", "--seed", "5", "--url", server.url)[0] == 0
    assert json.loads(path.read_text())["seed"] == 5


def test_addresses_are_normalised_and_it_is_said(capsys):
    with FakeServer() as server:
        code, summary, _, err = run(capsys, *SMALL, "--url", f"http://127.0.01:{server.port}/generate_stream")
    assert code == 0
    assert "address 127.0.01 means 127.0.0.1" in err
    assert summary["url"] == f"http://127.0.0.1:{server.port}/generate_stream"


def test_a_proxy_in_the_environment_is_not_used(capsys, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with FakeServer() as server:
        assert run(capsys, *SMALL, "--url", server.url)[0] == 0


def test_keys_are_sent_and_never_shown(capsys, tmp_path):
    (tmp_path / "key").write_text("secret-2\n")
    with FakeServer() as server:
        _, _, out, _ = run(capsys, *SMALL, "--url", server.url, "--api_key", "secret-1")
        assert {r.headers["authorization"] for r in server.requests} == {"Bearer secret-1"}
        assert "secret-1" not in out
        run(capsys, *SMALL, "--url", server.url, f"--api-key=@{tmp_path}/key")
        assert server.requests[-1].headers["authorization"] == "Bearer secret-2"


def test_a_missing_key_is_said_before_any_request(capsys):
    routes = {"/v1/models": lambda r: whole({"message": "a key is needed"}, 401)}
    with FakeServer(routes) as server:
        code, summary, _, err = run(capsys, *SMALL, "--url", server.url)
    assert (code, summary) == (1, None)
    assert "a key is needed; give the server's key with --api_key" in err


def test_no_server(capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        code, _, _, err = run(capsys, *SMALL, "--url", f"http://127.0.0.1:{probe.getsockname()[1]}")
    assert code == 1
    assert "cannot connect to 127.0.0.1:" in err
    assert "start the server first" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--server_api", "triton"], "triton is not served"),
        (["--server_api", "vllm"], "got vllm, allowed lightllm, openai, openai_chat"),
        (["--num_client", "3"], "unknown argument --num_client; nearest is --num_clients"),
        (["--input_num", "0"], "got 0, allowed int >= 1"),
        (["--input_len", "1.5"], "got 1.5, allowed int >= 1"),
        (["--timeout", "nan"], "got nan, allowed float"),
        (["--url", "ftp://x"], "--url: got 'ftp://x'"),
        (["--url", "http://h/generate_stream", "--server_api", "openai"], "needs --server_api lightllm"),
        (["--dump_file", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--tokenizer_path", "x"], "no tokenizer loader"),
        (["--api_key", "@/no/such/key"], "No such file"),
    ],
)
def test_bad_flags_exit_2(capsys, argv, words):
    code, _, out, err = run(capsys, *argv)
    assert code == 2
    assert words in err
    assert out == ""


def test_a_loader_is_asked_for_the_path(capsys):
    class Bytes:
        vocab_size = 256

        def encode(self, text, add_special_tokens=True):
            return [0] * add_special_tokens + list(text.encode())

        def decode(self, ids, skip_special_tokens=True):
            return bytes(ids).decode(errors="replace")

    asked = []

    def load(path):
        asked.append(path)
        return Bytes()

    with FakeServer() as server:
        assert cli.main([*SMALL, "--url", server.url, "--tokenizer_path", "/models/x"], load) == 0
    assert asked == ["/models/x"]
    assert not {"/tokenize", "/detokenize"} & set(server.paths())


def test_other_servers_need_none_of_our_own_routes(capsys):
    def missing(request):
        return whole("not found", 404)

    replaced = dict.fromkeys(("/v1/models", "/metrics"), missing)
    assert replaced.keys() <= ROUTES.keys()
    with FakeServer(replaced) as server:
        code, summary, _, _ = run(capsys, *SMALL, "--url", server.url + "/generate_stream")
    assert code == 0
    assert summary["server"] == "unknown, model unknown"
    assert summary["cached_prompt_tokens"] is None


def test_an_interrupt_reports_what_is_done(capsys):
    def fourth_interrupts(request):
        if server.paths().count("/generate_stream") == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return generate(request)

    flags = [*SMALL, "--num_clients", "1", "--warmup", "0"]
    with FakeServer({"/generate_stream": fourth_interrupts}) as server:
        server.delay_s = 0.02
        code, summary, out, _ = run(capsys, *flags, "--url", server.url)
    assert code == 1
    assert (summary["request_num"], summary["not_sent_num"]) == (3, 3)
    assert "valid num = 3; all data num = 6; valid ratio = 0.5" in out
    assert "not finished: 3 requests (interrupted)" in out


def test_progress_lines_without_a_terminal(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lightllm.bench.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with progress_view("running", 50, stream=stream) as progress:
        for second in range(12):
            now[0] = 100.0 + second
            progress.update(second, 1, 10 * second)
    assert stream.getvalue().splitlines() == [
        "running: 5/50 1 failed, 10.0 token/s",
        "running: 10/50 1 failed, 10.0 token/s",
    ]
