"""A transfer has ended when it has on every rank, and succeeded if it has on all."""

import pytest

from lightllm.engine.joint_transfers import JointTransfers
from lightllm.messages import KVArrival, KVFailure, KVTransfer, StepOutput
from lightllm.rank_messages import RankTransfers


def step(**fields) -> StepOutput:
    return StepOutput(step_id=1, token_ids=[], **fields)


def arrived(*request_ids: str) -> list[KVArrival]:
    return [KVArrival(request_id=request_id, first_token_id=5) for request_id in request_ids]


def ends(output: StepOutput) -> tuple[list[str], list[KVArrival], list[tuple[str, str]]]:
    return output.kv_sent, output.kv_received, [(f.request_id, f.reason) for f in output.kv_failed]


@pytest.mark.parametrize(
    ("kind", "a", "b"), [("sent", ["a"], ["b"]), ("received", arrived("a"), arrived("b"))]
)
def test_it_has_ended_when_the_last_rank_says_so(kind, a, b):
    joint = JointTransfers(3)
    assert ends(joint.joined(step(**{f"kv_{kind}": a + b}))) == ([], [], [])
    joint.note(RankTransfers(rank=2, **{f"kv_{kind}": a}))
    assert ends(joint.joined(step())) == ([], [], [])
    joint.note(RankTransfers(rank=1, **{f"kv_{kind}": a}))
    found = joint.joined(step())
    assert getattr(found, f"kv_{kind}") == a
    assert ends(joint.joined(step())) == ([], [], [])


def test_one_rank_that_fails_fails_it_once_the_others_have_ended():
    joint = JointTransfers(2)
    joint.note(RankTransfers(rank=1, kv_failed=[KVFailure(request_id="a", reason="cut")]))
    assert ends(joint.joined(step())) == ([], [], [])
    assert ends(joint.joined(step(kv_received=arrived("a")))) == ([], [], [("a", "rank 1: cut")])
    # The same request may try again.
    joint.note(RankTransfers(rank=1, kv_received=arrived("a")))
    assert ends(joint.joined(step(kv_received=arrived("a")))) == ([], arrived("a"), [])


@pytest.mark.parametrize("fault", ["", "peer_lost"])
def test_the_figures_are_those_of_all_ranks_together(fault):
    joint = JointTransfers(2)

    def end(num_bytes: int, duration_s: float, **fields) -> dict[str, list]:
        figures = KVTransfer(
            request_id="a", direction="sent", num_bytes=num_bytes, duration_s=duration_s, **fields
        )
        ending = (
            {"kv_failed": [KVFailure(request_id="a", reason="cut")]} if figures.fault else {"kv_sent": ["a"]}
        )
        return {"kv_transfers": [figures], **ending}

    assert not joint.joined(step(**end(100, 0.2, transport="shm"))).kv_transfers
    joint.note(RankTransfers(rank=1, **end(50, 0.1, fault=fault)))
    (figures,) = joint.joined(step()).kv_transfers
    assert figures == KVTransfer(
        request_id="a", direction="sent", transport="shm", fault=fault, num_bytes=150, duration_s=0.2
    )
    assert not joint.joined(step()).kv_transfers


def test_without_transfers_the_output_is_the_same_object():
    output = step(duration_s=0.5)
    assert JointTransfers(2).joined(output) is output
