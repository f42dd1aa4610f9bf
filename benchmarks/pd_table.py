"""The table at the end of benchmarks/pd_cluster.py: missing figures are dashes, failed parts their errors."""

from collections.abc import Iterator
from typing import Any

Row = tuple[str, str, str, str, str]
HEAD: Row = ("", "pd", "single", "pd / single", "wanted")
TTFT_RATIO, ITL_RATIO, PEER_SHARE = 1.10, 1.2, 0.70


def table(data: dict[str, Any]) -> list[str]:
    """Lines of text."""
    results = data["results"]
    pd, unsplit = results.get("pd", {}), results.get("unsplit", {})
    rows = [
        HEAD,
        *_texts(unsplit.get("compare", {})),
        *_ttft(pd.get("ttft", {}), unsplit.get("ttft", {})),
        *_link(results.get("gpus", {}).get("link", {})),
        *_transfers(pd, results.get("gpus", {}).get("link", {}).get("peer_copy_gb_per_s")),
        *_itl(pd.get("itl", {}), unsplit.get("itl", {})),
        *_goodput(pd.get("goodput", {}), unsplit.get("goodput", {})),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines = ["", *(line.rstrip() for line in lines), "", *_errors(results)]
    return [*lines, f"{data.get('total_s', 0):g} s in all{', interrupted' * bool(data.get('interrupted'))}"]


def _errors(results: dict[str, Any]) -> list[str]:
    """Failed parts, and requests that failed in others."""
    lines = []
    for cluster, parts in results.items():
        for name, entry in parts.items():
            if "error" in entry:
                lines.append(f"{cluster} {name}: ERROR {entry['error'].splitlines()[0][:200]}")
            lines += [f"{cluster} {name} {where}" for where in _failed_requests(entry, "")]
    return lines


def _failed_requests(entry: Any, where: str) -> Iterator[str]:
    """What stands under `errors` at any depth."""
    items = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    for key, value in items:
        if key in ("errors", "long_errors") and value:
            yield f"{where}{len(value)} kinds or requests failed: {str(value)[:200]}"
        else:
            yield from _failed_requests(value, f"{where}{key} ")


def _texts(compare: dict[str, Any]) -> list[Row]:
    if "equal" not in compare:
        return [("answers equal", "-", "-", "", "all")]
    gaps = [one["gap_nats"] for one in compare["differing"]]
    shown = f"; others at gaps of {', '.join(map(str, gaps))} nats" if gaps else ""
    equal = f"{compare['equal']} of {compare['prompts']}{shown}"
    drift = f"p50 {_number(compare.get('logprob_difference_p50'), 6)}"
    other = _number(compare.get("other_prompts_logprob_difference_p50"), 6)
    worst = _number(compare.get("logprob_difference_max"), 6)
    return [
        ("answers equal", equal, "", "", "all but near-ties"),
        ("logprobs differ by", f"{drift}, max {worst}", "", "", f"other prompts: {other}"),
    ]


def _ttft(pd: dict[str, Any], single: dict[str, Any]) -> list[Row]:
    rows = []
    for length in [key for key in {**pd, **single} if key.isdigit()]:
        ours, theirs = pd.get(length, {}), single.get(length, {})
        a, b = ours.get("p50_ms"), theirs.get("p50_ms")
        rows.append((f"TTFT p50, {length} tokens", _ms(a), _ms(b), _ratio(a, b), f"<= {TTFT_RATIO:.2f}"))
        for name in ("second", "third"):
            a, b = ours.get(f"{name}_token_p50_ms"), theirs.get(f"{name}_token_p50_ms")
            rows.append((f"  {name} token behind it, {length}", _ms(a), _ms(b), "", ""))
    return rows


def _link(link: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [("plain copy GPU to GPU", _gb(link.get("peer_copy_gb_per_s")), "", "", "")]
    for one in link.get("transfers", []):
        if "left_out" in one:
            rows.append((f"KV by {one['lane']}, no model", one["left_out"][:60], "", "", ""))
            continue
        what = (
            f"KV by {one['lane']} alone, {one['at_once']} x {one['tokens']} {one['slots']}, {one['ordered']}"
        )
        if "gb_per_s_median" not in one:  # it moved while the step went on: what is left is no rate
            rows.append((f"{what}, {one['computed']}", f"{_ms(one['ms_median'])} behind that", "", "", ""))
            continue
        share = one.get("share_of_peer_copy")
        shown = f", {share:.0%} of it" if share is not None else ""
        figure = f"{_gb(one['gb_per_s_median'])}, {_ms(one['ms_median'])}{shown}"
        rows.append((what, figure, "", "", f">= {PEER_SHARE:.0%}"))
    return rows


def _transfers(pd: dict[str, Any], peer: float | None) -> list[Row]:
    ttft, transfer = pd.get("ttft", {}), pd.get("transfer", {})
    found = {f"KV of {key}, computed meanwhile": one.get("transfers", {}) for key, one in ttft.items()
             if isinstance(one, dict)}  # fmt: skip
    found |= {f"KV of the longest, {key}": transfer.get(key, {}) for key in ("cached", "burst")}
    rows = []
    for what, one in found.items():
        lanes = ", ".join(f"{lane} {mb:g} MB" for lane, mb in one.get("lanes", {}).items())
        rate = one.get("gb_per_s_p50")
        figure = f"{_gb(rate)}, {_ms(one.get('ms_p50'))}" + (f", {rate / peer:.1%}" if rate and peer else "")
        rows.append((what, figure, "", "", f"{one.get('transfers', 0)} by {lanes or '-'}"))
    return rows


def _itl(pd: dict[str, Any], single: dict[str, Any]) -> list[Row]:
    def cell(one: dict[str, Any]) -> str:
        return f"{_ms(one.get('p50_ms'))} / {_ms(one.get('p99_ms'))}"

    def loaded(one: dict[str, Any]) -> str:
        ratio = one.get("p99_ratio")
        return cell(one) + (f" = {ratio:.2f} x idle" if ratio is not None else "")

    names = {"long_1": "  + long prompts, no KV moves", "long_2": "  + long prompts, KV moves"}
    rows: list[Row] = [
        ("ITL p50 / p99, idle", cell(pd.get("idle", {})), cell(single.get("idle", {})), "", "")
    ]
    for key, name in names.items():
        ours, theirs = pd.get(key, {}), single.get(key, {})
        shown = loaded(theirs) if theirs else ""
        rows.append((name, loaded(ours), shown, "", f"pd p99 <= {ITL_RATIO} x idle"))
    return rows


def _goodput(pd: dict[str, Any], unsplit: dict[str, Any]) -> list[Row]:
    def cell(one: dict[str, Any]) -> str:
        if not one:
            return "-"
        return (
            f"{one['share']:.0%} (gap p99: {one['share_gap_p99']:.0%}), TTFT p90 {_ms(one['ttft_p90_ms'])}, "
            f"ITL p90 {_ms(one['itl_p90_ms'])}"
        )

    ours = {step["rate"]: step for step in pd.get("steps", [])}
    theirs = {step["rate"]: step for step in unsplit.get("steps", [])}
    rows: list[Row] = [("in time at requests/s:", "", "(two nodes)", "", "")]
    for rate in sorted({*ours, *theirs}):
        rows.append((f"  {rate:g}", cell(ours.get(rate, {})), cell(theirs.get(rate, {})), "", ""))
    for key, name in (("goodput", "goodput, mean ITL"), ("goodput_gap_p99", "goodput, gap p99")):
        a, b = pd.get(key), unsplit.get(key)
        rows.append((name, _number(a, 1), _number(b, 1), _ratio(a, b), ">= 90 % in time"))
    return rows


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _gb(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} GB/s"


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a is not None and b else ""
