"""The streaming session without a network: what it answers, when it ends, and the laws of its two modes."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import DeadlinePassed
from service.poses import Options, parse_one
from service.streaming.session import Closing, Limits, Session
from service.streaming.wire import Close, encode_pose

REST = [0.0] * 72
PELVIS = np.array([0.01, -0.23, 0.03], np.float32)
LIMITS = Limits(messages_per_s=1000, credits=4)


def check(pose: Any, translation: Any) -> Any:
    checked = parse_one(pose, translation, Options(), PELVIS)
    return checked.rotations[0], checked.translation[0]


def session(mode: Any = "live", **options: Any) -> Session:
    return Session(mode, check, 0.0, **{"limits": LIMITS, "max_fps": 100.0} | options)


def say(of: Session, now: float = 0.0, **message: Any) -> list[Any]:
    return of.receive(json.dumps(message), now)


def pose(of: Session, seq: int, now: float = 0.0, numbers: Any = REST, **more: Any) -> list[Any]:
    return say(of, now, type="pose", seq=seq, pose=numbers, **more)


def step(of: Session, now: float) -> list[int]:
    """Compute and send what may be sent; the `seq` of the frames."""
    return [of.frame_sent(taken, now).seq for taken in of.take(now)]


def test_json_and_binary_say_the_same() -> None:
    rng = np.random.default_rng(3)
    numbers, moved = rng.normal(0, 0.4, 72).astype(np.float32), rng.normal(0, 1, 3).astype(np.float32)
    one, other = session(), session()
    assert pose(one, 7, 0.0, numbers.tolist(), trans=moved.tolist(), t=99) == []
    assert other.receive(encode_pose(7, numbers, moved, 99), 0.0) == []
    (a,), (b,) = one.take(0.0), other.take(0.0)
    assert (a.seq, a.client_us) == (b.seq, b.client_us) == (7, 99)
    np.testing.assert_array_equal(a.rotations, b.rotations)
    np.testing.assert_array_equal(a.translation, b.translation)


def test_live_takes_the_newest_and_counts_what_it_leaves() -> None:
    live = session()
    for seq in (1, 5, 9):
        assert pose(live, seq) == []
    (taken,) = live.take(0.0)
    assert taken.seq == 9
    for seq in (10, 11):
        pose(live, seq)
    assert live.take(0.0) == []  # one at a time
    assert live.frame_sent(taken, 0.0).dropped_before
    (taken,) = live.take(1.0)
    assert (taken.seq, live.frame_sent(taken, 1.0).dropped_before) == (11, True)
    say(live, type="ack", seq=11)
    pose(live, 12)
    (taken,) = live.take(2.0)
    assert not live.frame_sent(taken, 2.0).dropped_before
    assert (live.stats.poses, live.stats.frames, live.stats.dropped) == (6, 3, 3)


@pytest.mark.parametrize("mode", ["live", "complete"])
def test_no_more_than_the_window_is_unacknowledged(mode: Any) -> None:
    of = session(mode, window=2)
    sent = []
    for seq in range(4):
        pose(of, seq, float(seq))
        sent += step(of, float(seq))
    assert sent == [0, 1]
    say(of, 4.0, type="ack", seq=0)
    assert step(of, 5.0) == ([3] if mode == "live" else [2])
    say(of, 6.0, type="ack", seq=of._last_sent_seq)
    assert step(of, 7.0) == ([] if mode == "live" else [3])


def test_complete_refuses_more_poses_than_it_gave_credits() -> None:
    complete = session("complete")
    for seq in range(4):
        assert pose(complete, seq) == []
    error, closing = pose(complete, 4)
    assert (error["code"], error["seq"]) == ("credits-exceeded", 4)
    assert closing == Closing(Close.POLICY, "credits-exceeded")


def test_a_frame_gives_its_credit_back() -> None:
    complete = session("complete", window=1)
    for seq in range(20):
        assert pose(complete, seq, float(seq)) == []
        assert step(complete, float(seq)) == [seq]
        say(complete, float(seq), type="ack", seq=seq)


def test_the_rate_is_held_and_jitter_forgiven() -> None:
    live, sent = session(max_fps=10.0, window=8), []
    for n in range(200):  # 100 poses a second for two seconds
        now = n / 100
        pose(live, n, now)
        done = step(live, now)
        sent += done
        if done:
            say(live, now, type="ack", seq=done[-1])
    assert 20 <= len(sent) <= 22


def test_fault_01_a_number_that_is_not_finite() -> None:
    for spoiled in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = json.dumps({"type": "pose", "seq": 1, "pose": REST}).replace("0.0", spoiled, 1)
        (error,) = session().receive(text, 0.0)
        assert (error["type"], error["code"], error["status"], error["seq"]) == ("error", "pose-not-finite", 422, 1)
        assert error["joint"] == 0
    live = session()
    binary = encode_pose(1, np.full(72, np.nan))
    assert [len(live.receive(binary, 0.0)) for _ in range(2)] == [1, 1]
    error, closing = live.receive(binary, 0.0)
    assert (error["code"], closing) == ("pose-not-finite", Closing(Close.NOT_JSON, "pose-not-finite"))


@pytest.mark.parametrize("numbers", [[0.0] * 71, [0.0] * 75, [[0.0] * 3] * 23 + [[0.0]], [[0.0] * 3] * 25, 7, {}, "x"])
def test_fault_02_a_wrong_shape(numbers: Any) -> None:
    live = session()
    for n in range(3):
        error, *closing = pose(live, n, 0.0, numbers)
        assert error["code"] in ("pose-shape-invalid", "pose-not-number")
        assert closing == ([Closing(Close.BAD_MESSAGES, error["code"])] if n == 2 else [])
    assert live.take(1.0) == []


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"pose": np.full((24, 3, 3), 0.3).tolist()}, "pose-not-rotation"),
        ({"pose": [20.0] * 72}, "pose-out-of-range"),
        ({"pose": REST, "trans": [0, 1e5, 0]}, "pose-out-of-range"),
        ({"pose": REST, "trans": [0, 1]}, "pose-shape-invalid"),
        ({"pose": ["0.0"] * 72}, "pose-not-number"),
        ({"pose": [True] * 72}, "pose-not-number"),
    ],
)
def test_fault_03_not_a_rotation_or_out_of_range(members: dict[str, Any], code: str) -> None:
    live = session()
    for n in range(3):
        error, *closing = say(live, type="pose", seq=n, **members)
        assert error["code"] == code
    assert closing == [Closing(Close.BAD_MESSAGES, code)]


@pytest.mark.parametrize("numbers", [[], [[]], None])
def test_fault_04_an_empty_pose(numbers: Any) -> None:
    (error,) = pose(session(), 1, 0.0, numbers)
    assert error["code"] in ("pose-shape-invalid", "pose-not-number")


def test_fault_05_a_message_that_is_too_large() -> None:
    assert session().receive("[" + "0," * 40_000 + "0]", 0.0) == [Closing(Close.TOO_BIG, "message-too-big")]
    assert session().receive(bytes(1 << 17), 0.0) == [Closing(Close.TOO_BIG, "message-too-big")]


def test_fault_23_bytes_that_are_no_pose() -> None:
    good = encode_pose(1, np.zeros(72))
    for data in (b"", good[:-1], good + b"\0", b"AVF1" + good[4:]):
        assert session().receive(data, 0.0) == [Closing(Close.WRONG_TYPE, "not-a-pose")]


def test_fault_23_a_flood() -> None:
    live = session(limits=Limits(messages_per_s=50))
    answers = [say(live, n / 1000, type="ping") for n in range(100)]
    flooded = next(n for n, answer in enumerate(answers) if answer[0]["type"] == "error")
    assert 50 <= flooded <= 60
    assert answers[flooded][1] == Closing(Close.TOO_FAST, "too-many-messages")
    patient = session(limits=Limits(messages_per_s=50))
    assert all(say(patient, n / 50, type="ping")[0]["type"] == "pong" for n in range(200))


@pytest.mark.parametrize("text", ["", "{", "nul", "[" * 60_000, '{"a":' * 9_000, "[]", "1", '"end"', "9" * 5_000])
def test_fault_34_text_that_is_no_object(text: str) -> None:
    assert session().receive(text, 0.0) == [Closing(Close.NOT_JSON, "json-broken")]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "nonsense"}, "message-invalid"),
        ({}, "message-invalid"),
        ({"type": ["pose"]}, "message-invalid"),
        ({"type": "pose", "seq": 1}, "message-invalid"),
        ({"type": "pose", "pose": REST}, "message-invalid"),
        ({"type": "pose", "seq": True, "pose": REST}, "message-invalid"),
        ({"type": "pose", "seq": 1 << 32, "pose": REST}, "message-invalid"),
        ({"type": "pose", "seq": 1, "t": -1, "pose": REST}, "message-invalid"),
        ({"type": "ack", "seq": 0}, "ack-invalid"),
        ({"type": "config", "max_fps": 0}, "message-invalid"),
        ({"type": "config", "max_fps": float("nan")}, "message-invalid"),
        ({"type": "config", "window": 9}, "message-invalid"),
        ({"type": "config", "window": 1.0}, "message-invalid"),
    ],
)
def test_what_is_not_in_the_protocol_is_refused_and_changes_nothing(message: dict[str, Any], code: str) -> None:
    live = session()
    (error,) = say(live, **message)
    assert (error["type"], error["code"]) == ("error", code)
    assert (live.max_fps, live.window, live.stats.poses, live.take(1.0)) == (100.0, 2, 0, [])


def test_seq_must_rise_and_may_leap() -> None:
    live = session(last_seq=10)
    assert pose(live, 10)[0]["code"] == "seq-invalid"
    assert pose(live, 11) == []
    assert pose(live, 11)[0]["code"] == "seq-invalid"
    assert pose(live, 5000) == []


def test_a_good_pose_forgives_the_bad_ones() -> None:
    live = session()
    for n in range(0, 20, 3):
        assert len(pose(live, n, 0.0, [0.0])) == 1
        assert len(pose(live, n + 1, 0.0, [0.0])) == 1
        assert pose(live, n + 2) == []


def test_fault_19_a_live_pose_whose_time_has_passed_is_dropped_and_counted() -> None:
    live = session()
    pose(live, 1)
    assert live.not_computed(live.take(0.0), 0.0, DeadlinePassed()) == []
    pose(live, 2, 1.0)
    (taken,) = live.take(1.0)
    assert live.frame_sent(taken, 1.0).dropped_before
    assert (live.stats.poses, live.stats.frames, live.stats.dropped) == (2, 1, 1)


def test_fault_17_overload_ends_a_live_stream_only_when_it_lasts() -> None:
    live = session()
    for n in range(6):
        now = n * 0.5
        pose(live, n, now)
        assert live.not_computed(live.take(now), now, DeadlinePassed()) == []
    pose(live, 9, 3.0)
    error, closing = live.not_computed(live.take(3.0), 3.0, DeadlinePassed())
    assert (error["type"], closing.code) == ("error", Close.OVERLOADED)
    complete = session("complete")
    pose(complete, 1)
    assert complete.not_computed(complete.take(0.0), 0.0, DeadlinePassed())[1].code == Close.OVERLOADED


def test_fault_22_who_is_silent_is_asked_and_then_left() -> None:
    live = session()
    assert live.tick(5.0) == []
    assert [message["type"] for message in live.tick(5.5)] == ["ping"]
    assert live.tick(6.0) == []
    say(live, 9.0, type="pong")
    assert live.tick(13.0) == []
    live.tick(18.0)
    assert live.tick(19.5) == [Closing(Close.POLICY, "silent")]


def test_fault_21_who_never_acknowledges_is_left() -> None:
    live = session()
    pose(live, 1)
    step(live, 1.0)
    for now in range(2, 11):
        say(live, float(now), type="pong")
        assert live.tick(float(now)) == []
    say(live, 12.0, type="pong")
    assert live.tick(12.0) == [Closing(Close.POLICY, "unacknowledged")]


def test_end_waits_for_what_was_accepted() -> None:
    complete = session("complete", window=1)
    for seq in range(3):
        pose(complete, seq)
    assert say(complete, type="end") == []
    assert pose(complete, 9)[0]["code"] == "message-invalid"
    for seq in range(3):
        assert complete.finish() == []
        (taken,) = complete.take(1.0)
        assert complete.finish() == []
        complete.frame_sent(taken, 1.0)
        assert complete.finish() == []  # not before the last ack: the close must not overtake the frame
        say(complete, 1.0, type="ack", seq=seq)
    end, closing = complete.finish()
    assert (end["type"], end["stats"]["frames"], closing.code) == ("end", 3, Close.DONE)


# Whatever comes, in whatever order

SERVER_TYPES = {"error", "config", "ping", "pong", "end"}
numbers = st.one_of(
    st.just(REST),
    st.lists(st.floats(-9, 9), min_size=72, max_size=72),
    st.lists(st.floats(), min_size=60, max_size=76),
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3), st.lists, max_leaves=9),
)
seqs = st.one_of(st.integers(0, 30), st.integers(), st.none(), st.floats())
texts = st.one_of(
    st.builds(lambda seq, p: {"type": "pose", "seq": seq, "pose": p}, st.integers(0, 60), st.just(REST)),
    st.builds(lambda seq, p, t: {"type": "pose", "seq": seq, "pose": p, "trans": t}, seqs, numbers, numbers),
    st.builds(lambda seq: {"type": "ack", "seq": seq}, seqs),
    st.builds(
        lambda a, b: {"type": "config", "max_fps": a, "window": b}, st.floats() | st.integers(), st.integers(0, 9)
    ),
    st.builds(lambda kind: {"type": kind}, st.sampled_from(["ping", "pong", "end", "hello", "", "frame"])),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
).map(json.dumps)
messages = st.one_of(texts, texts, texts, st.text(max_size=20), st.binary(max_size=20),
                     st.builds(lambda seq: encode_pose(seq, np.zeros(72)), st.integers(0, 60)))  # fmt: skip
actions = st.lists(st.one_of(messages, st.sampled_from(["take", "sent", "ack", "fail", "tick"])), max_size=60)


@settings(deadline=None, max_examples=300)
@given(mode=st.sampled_from(["live", "complete"]), window=st.integers(1, 3), actions=actions,
       steps=st.lists(st.floats(0, 0.4), min_size=60, max_size=60))  # fmt: skip
def test_laws_of_a_session(mode: Any, window: int, actions: list[Any], steps: list[float]) -> None:
    of = session(mode, window=window)
    now, computing, accepted, sent, closed = 0.0, [], [], [], False
    for action, duration in zip(actions, steps, strict=False):
        now += duration
        poses_before, out = of.stats.poses, []
        if action == "take":
            newest = of._waiting[-1].seq if of._waiting else None
            taken = of.take(now)
            computing += taken
            if mode == "live" and taken:
                assert [pose.seq for pose in taken] == [newest] == accepted[-1:]  # the newest pose wins
        elif action == "sent" and computing:
            numbers = of.frame_sent(computing.pop(0), now)
            assert numbers.frame == len(sent)
            sent.append(numbers.seq)
        elif action == "ack" and sent:
            out = say(of, now, type="ack", seq=sent[-1])
            assert out == [] or out[0]["code"] == "too-many-messages"
        elif action == "fail" and computing and mode == "live":
            out = of.not_computed([computing.pop(0)], now, DeadlinePassed())
        elif action == "tick":
            out = of.tick(now)
        elif action not in ("take", "sent", "ack", "fail", "tick"):
            out = of.receive(action, now)
        if of.stats.poses > poses_before:
            accepted.append(of._last_seq)
            assert out == []
        out += of.finish()
        for n, message in enumerate(out):
            if isinstance(message, Closing):
                assert n == len(out) - 1
                closed = True
            else:
                assert message["type"] in SERVER_TYPES
                json.loads(json.dumps(message, allow_nan=False))
        assert len(of._unacked) <= max(window, of.limits.max_window)
        assert len(of._waiting) <= (1 if mode == "live" else LIMITS.credits)
        in_flight = len(of._waiting) + len(computing)
        assert of.stats.poses == of.stats.frames + of.stats.dropped + in_flight
        if closed:
            break
    assert sent == sorted(set(sent))  # each pose at most once, in rising order
    if mode == "complete":
        assert sent == accepted[: len(sent)]  # in order, none left out
