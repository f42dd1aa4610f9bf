"""Statistics of a run, and how they are printed and kept.

The dictionary has the keys of LightLLM's own script (`backend` ... `decode_token_time_dict`) with its units
(seconds, but milliseconds for decode_token_time), and more of ours behind them. Sends nothing.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec

from lightllm.bench.load import RequestResult
from lightllm.errors import ConfigError

PERCENTILES = (25, 50, 75, 90, 95, 99, 100)
NUM_EXAMPLES = 3
NUM_LISTED = 20
FAILURE_KINDS = ("status", "connect", "timeout", "error_frame", "cut", "bad_answer")


class RunFacts(msgspec.Struct, kw_only=True):
    """What the report needs to know beside the records. `cached_prompt_tokens` counts the whole server."""

    backend: str
    clients: int
    url: str
    model: str
    server: str
    command: str
    seed: int
    input_len: int
    output_len: int
    input_qps: float
    num_jobs: int
    duration_s: float
    cached_prompt_tokens: int | None = None


def percentile(values: Sequence[float], share: float) -> float:
    """Value below which `share` percent of `values` lie, linear between neighbours; `values` is not empty."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * share / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def percentile_dict(values: Iterable[float], scale: float = 1.0) -> dict[str, float]:
    """The usual percentiles of `values` times `scale`; empty if there are none."""
    ordered = sorted(values)
    return {f"P{share}": percentile(ordered, share) * scale for share in PERCENTILES} if ordered else {}


def summarise(results: Sequence[RequestResult], facts: RunFacts) -> dict[str, Any]:
    """The result of a run, ready for JSON. Failed requests count in no rate and no percentile."""
    valid = [result for result in results if result.failure is None]
    input_lens = [facts.input_len if r.prompt_tokens is None else r.prompt_tokens for r in valid]
    num_input, num_output = sum(input_lens), sum(result.output_tokens for result in valid)
    num_valid = len(valid)
    return {
        "backend": facts.backend,
        "clients": facts.clients,
        "request_num": num_valid,
        "Total QPS": num_valid / facts.duration_s,
        "Avg Input Length": num_input / max(num_valid, 1),
        "Avg Output Length": num_output / max(num_valid, 1),
        "Total Throughput": (num_input + num_output) / facts.duration_s,
        "Input Throughput": num_input / facts.duration_s,
        "Output Throughput": num_output / facts.duration_s,
        "request_time": percentile_dict(r.request_s for r in valid),
        "first_token_time_dict": percentile_dict(r.first_token_s for r in valid),
        "decode_token_time_dict": percentile_dict(
            (r.decode_token_s for r in valid if r.decode_token_s is not None), scale=1000
        ),
        "inter_token_gap_dict": percentile_dict((gap for r in valid for gap in r.gaps_s), scale=1000),
        "all_request_num": facts.num_jobs,
        "failures": _failures(results),
        "not_sent_num": facts.num_jobs - len(results),
        "input_length_differences": _input_differences(valid, facts.input_len),
        "wrong_output_lengths": _wrong_lengths(valid),
        "cached_prompt_tokens": _cached_tokens(valid, facts),
        "duration_s": facts.duration_s,
        "input_len": facts.input_len,
        "output_len": facts.output_len,
        "input_qps": facts.input_qps,
        "seed": facts.seed,
        "url": facts.url,
        "model": facts.model,
        "server": facts.server,
        "command": facts.command,
    }


def _failures(results: Sequence[RequestResult]) -> dict[str, dict[str, Any]]:
    failures: dict[str, dict[str, Any]] = {}
    for kind in FAILURE_KINDS:
        messages = [result.message for result in results if result.failure == kind]
        if messages:
            examples = list(dict.fromkeys(messages))[:NUM_EXAMPLES]
            failures[kind] = {"count": len(messages), "examples": examples}
    return failures


def _input_differences(valid: Sequence[RequestResult], input_len: int) -> dict[str, int]:
    """How far the server's counts of prompt tokens are from what was asked; empty if all agree."""
    counts = [result.prompt_tokens for result in valid if result.prompt_tokens is not None]
    differences = [count - input_len for count in counts if count != input_len]
    found = {}
    if differences:
        found = {"count": len(differences), "smallest": min(differences), "largest": max(differences)}
    if len(counts) < len(valid):
        found["not_reported"] = len(valid) - len(counts)
    return found


def _wrong_lengths(valid: Sequence[RequestResult]) -> list[dict[str, int]]:
    return [
        {"request": result.index, "asked": result.asked_tokens, "got": result.output_tokens}
        for result in valid
        if result.output_tokens != result.asked_tokens
    ]


def _cached_tokens(valid: Sequence[RequestResult], facts: RunFacts) -> int | None:
    counts = [result.cached_tokens for result in valid if result.cached_tokens is not None]
    return sum(counts) if counts else facts.cached_prompt_tokens


def format_report(summary: dict[str, Any]) -> str:
    """The summary as LightLLM's script prints it, then our own lines, then the dictionary."""
    num_valid, num_all = summary["request_num"], summary["all_request_num"]
    ratio = num_valid / num_all
    lines = ["", f"valid num = {num_valid}; all data num = {num_all}; valid ratio = {ratio}", ""]
    lines += [f"{name}: {summary[name]}" for name in ("Total QPS", "Avg Input Length", "Avg Output Length")]
    for name in ("Total Throughput", "Input Throughput", "Output Throughput"):
        lines.append(f"{name}: {summary[name]} token/s")
    lines.append("-" * 10)
    lines += _percentile_lines("request_time", summary["request_time"], "s")
    lines += _percentile_lines("first_token_time ", summary["first_token_time_dict"], "s")
    lines += _percentile_lines("decode_token_time ", summary["decode_token_time_dict"], "ms")
    lines += _percentile_lines("inter_token_gap ", summary["inter_token_gap_dict"], "ms")
    lines += _own_lines(summary)
    lines.append(str(summary))
    return "\n".join(lines)


def _percentile_lines(name: str, values: dict[str, float], unit: str) -> list[str]:
    lines = [f"{name} {share}: {value:.6f}{unit}" for share, value in values.items()]
    return [*(lines or [f"{name.strip()}: no data"]), "-" * 10]


def _own_lines(summary: dict[str, Any]) -> list[str]:
    cached = summary["cached_prompt_tokens"]
    lines = [f"cached prompt tokens: {'not reported' if cached is None else cached}"]
    failures = summary["failures"]
    counts = ", ".join(f"{kind} {entry['count']}" for kind, entry in failures.items())
    lines.append(f"failures: {counts or 'none'}")
    for kind, entry in failures.items():
        lines += [f"  {kind}: {example}" for example in entry["examples"]]
    if summary["not_sent_num"]:
        lines.append(f"not finished: {summary['not_sent_num']} requests (interrupted)")
    lines += _length_lines(summary)
    lines.append(f"server: {summary['server']}")
    lines.append(f"command: {summary['command']}")
    return lines


def _length_lines(summary: dict[str, Any]) -> list[str]:
    lines = []
    differences = summary["input_length_differences"]
    if "count" in differences:
        low, high = differences["smallest"], differences["largest"]
        lines.append(
            f"input length: by the server's count {differences['count']} requests differ from the "
            f"{summary['input_len']} tokens asked, by {low:+d}{f'..{high:+d}' if high != low else ''}"
        )
    if "not_reported" in differences:
        lines.append(f"input length: the server did not report it for {differences['not_reported']} requests")
    wrong = summary["wrong_output_lengths"]
    if wrong:
        lines.append(f"wrong output lengths: {len(wrong)} requests")
        lines += [f"  request {w['request']}: asked {w['asked']}, got {w['got']}" for w in wrong[:NUM_LISTED]]
    if len(wrong) > NUM_LISTED:
        lines.append(f"  and {len(wrong) - NUM_LISTED} more, see the dictionary")
    return lines


def show_existing(path: Path, out: TextIO) -> None:
    """Print the results kept in `path` instead of running.

    Raises:
        ConfigError: the file cannot be read or is not JSON.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--dump_file {path} exists but holds no JSON ({exc}); use --overwrite") from None
    print(f"not run: {path} exists", file=out)
    print(json.dumps(kept, indent=4), file=out)


def dump(summary: dict[str, Any], path: Path) -> None:
    """Write the summary to `path` as JSON, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=4)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as exc:
        raise ConfigError(f"--dump_file {path}: cannot be written: {exc.strerror}") from None
