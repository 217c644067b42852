"""The engine: what ONNX Runtime answers reaches the caller whole, in any number of runs, in either form."""

import threading
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service import engine as engines
from service.bundle.skeleton import Skeleton, axis_angle_to_matrix
from service.engine import Engine, OnnxEngine
from service.errors import AvatarUnavailable, EngineFailed


@pytest.fixture
def inputs(skeleton: Skeleton) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    rotations = axis_angle_to_matrix(rng.normal(0, 0.4, (7, 24, 3)))
    bones = skeleton.bone_transforms(rotations)
    roots = skeleton.root_transforms(rotations, rng.normal(0, 1, (7, 3)))
    return rng.normal(0, 0.4, (50, 3)).astype(np.float32), bones, roots


def with_forms(graph: bytes, factor: float) -> bytes:
    """The same graph as the fast form, and `factor` times its vertices as the plain one."""
    model = onnx.load_from_string(graph)
    graph_proto = model.graph
    graph_proto.node[-1].output[0] = "fast"
    branches = {
        name: helper.make_graph(
            [helper.make_node("Mul", ["fast", f"{name}_factor"], [f"{name}_vertices"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_vertices", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.array(value, np.float32), f"{name}_factor")],
        )
        for name, value in (("then", factor), ("else", 1.0))
    }
    choice = helper.make_node("If", ["plain"], ["vertices"], then_branch=branches["then"], else_branch=branches["else"])
    graph_proto.node.append(choice)
    graph_proto.input.append(helper.make_tensor_value_info("plain", TensorProto.BOOL, []))
    graph_proto.initializer.append(numpy_helper.from_array(np.array(False), "plain"))
    return model.SerializeToString()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("at_once", [1, 50, 149, 1_000])
def test_a_batch_in_parts_is_the_batch(
    engine: Engine, make_graph: Callable[..., bytes], inputs, at_once: int, threads: int, monkeypatch
) -> None:
    monkeypatch.setattr(engines, "AT_ONCE", {"cpu": at_once})
    answer = OnnxEngine(make_graph(), threads=threads).repose(*inputs)
    assert answer.dtype == np.float32
    assert answer.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(answer, engine.repose(*inputs), atol=1e-5)


@pytest.mark.parametrize("worth_it", [1, 20, 100])
def test_threads_share_the_vertices_of_a_single_frame(
    engine: Engine, make_graph: Callable[..., bytes], inputs, worth_it: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "WORTH_A_THREAD", worth_it)
    vertices, bones, roots = inputs
    shared = OnnxEngine(make_graph(), threads=3)
    assert len(shared._parts(1, len(vertices))) == {1: 3, 20: 2, 100: 1}[worth_it]
    np.testing.assert_allclose(shared.repose(vertices, bones[2:3], roots[2:3]), engine.repose(*inputs)[2:3], atol=1e-5)


def test_it_is_said_which_frames_are_computed_by_the_thread_that_calls(
    make_graph: Callable[..., bytes], inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "WORTH_A_THREAD", 20)
    ran_by, here = OnnxEngine._run, threading.get_ident()
    used: list[int] = []
    monkeypatch.setattr(OnnxEngine, "_run", lambda *run: (used.append(threading.get_ident()), ran_by(*run)))
    vertices, bones, roots = inputs
    alone = OnnxEngine(make_graph(), threads=3, cpu_only=True)
    assert alone.alone_up_to == 39
    alone.repose(vertices[:39], bones[:1], roots[:1])
    assert used == [here]
    alone.repose(vertices[:40], bones[:1], roots[:1])
    assert len(used) == 3
    assert here not in used[1:]
    assert OnnxEngine(make_graph(), plain=True).alone_up_to == 0


def test_answers_are_the_callers_own(make_graph: Callable[..., bytes], inputs) -> None:
    """A later run must not write into an earlier answer."""
    engine = OnnxEngine(make_graph(), threads=1)
    first = engine.repose(*inputs)
    kept = first.copy()
    engine.repose(inputs[0] + 1, *inputs[1:])
    np.testing.assert_array_equal(first, kept)


def test_inputs_may_be_views_of_any_layout(make_graph: Callable[..., bytes], inputs) -> None:
    engine = OnnxEngine(make_graph(), threads=1)
    vertices, bones, roots = inputs
    views = np.asfortranarray(vertices), np.asfortranarray(bones)[::-1], roots.astype(np.float64)[::-1]
    np.testing.assert_array_equal(engine.repose(*views), engine.repose(*inputs)[::-1])


def test_no_frames_are_an_empty_answer(make_graph: Callable[..., bytes], inputs) -> None:
    vertices, bones, roots = inputs
    assert OnnxEngine(make_graph(), threads=1).repose(vertices, bones[:0], roots[:0]).shape == (0, 50, 3)


def test_threads_share_an_engine(make_graph: Callable[..., bytes], inputs) -> None:
    engine, vertices = OnnxEngine(make_graph(), threads=1), inputs[0]
    answers: dict[int, np.ndarray] = {}

    def ask(number: int) -> None:
        answers[number] = engine.repose(vertices + np.float32(number), *inputs[1:])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for number in range(8):
        np.testing.assert_array_equal(answers[number], engine.repose(vertices + np.float32(number), *inputs[1:]))


def test_the_fast_form_runs_unless_the_plain_one_is_asked_for(make_graph: Callable[..., bytes], inputs) -> None:
    graph = with_forms(make_graph(), 2.0)
    expected = OnnxEngine(make_graph(), threads=1).repose(*inputs)
    np.testing.assert_allclose(OnnxEngine(graph, threads=1).repose(*inputs), expected, atol=1e-6)
    np.testing.assert_allclose(OnnxEngine(graph, threads=1, plain=True).repose(*inputs), 2 * expected, atol=1e-6)


def test_a_graph_of_one_form_runs_it_either_way(make_graph: Callable[..., bytes], inputs) -> None:
    """As older bundles have it."""
    first, second = (OnnxEngine(make_graph(), threads=1, plain=plain).repose(*inputs) for plain in (False, True))
    np.testing.assert_array_equal(first, second)


def test_more_vertices_than_asked_for_are_an_error(make_graph: Callable[..., bytes], inputs) -> None:
    """They would be written behind the end of the answer."""
    model = onnx.load_from_string(make_graph())
    model.graph.node[-1].output[0] = "half"
    model.graph.node.append(helper.make_node("Concat", ["half", "half"], ["vertices"], axis=1))
    with pytest.raises(EngineFailed):
        OnnxEngine(model.SerializeToString(), threads=1).repose(*inputs)


def test_what_onnx_runtime_raises_becomes_our_error(make_graph: Callable[..., bytes], inputs) -> None:
    vertices, bones, roots = inputs
    with pytest.raises(EngineFailed):
        OnnxEngine(make_graph(), threads=1).repose(vertices, bones[:, :23], roots)
    with pytest.raises(AvatarUnavailable):
        OnnxEngine(b"no graph", threads=1)


def test_fault_28_a_gpu_that_does_not_start_is_said(
    make_graph: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime says nothing: it gives a session on the CPU."""
    session = engines.ort.InferenceSession
    monkeypatch.setattr(
        engines.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        engines.ort, "InferenceSession", lambda graph, options, providers: session(graph, options, providers[-1:])
    )
    engine = OnnxEngine(make_graph())
    assert (engine.device, engine.provider) == ("cpu", "CPUExecutionProvider")
    assert "running on the CPU" in caplog.text
    caplog.clear()
    assert OnnxEngine(make_graph(), cpu_only=True).device == "cpu"
    assert not caplog.records  # nobody asked for one
