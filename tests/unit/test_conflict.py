"""Conflict between tasks from the Gramian: figures by hand, over steps, per level; in a run's rows and its state."""

import math

import pytest
import scene_run
import torch

from visionmtl.balance.conflict import MEMORY, ConflictTrace, pairs


def gramian(*vectors: tuple[float, ...]) -> torch.Tensor:
    rows = torch.tensor(vectors, dtype=torch.float64)
    return rows @ rows.T


def test_the_figures_of_two_gradients_by_hand():
    trace = ConflictTrace(2)
    trace.update(gramian((3.0, 4.0), (-1.0, 0.0)))  # lengths 5 and 1, inner product -3
    figures = pairs(trace.read(), ["a", "b"])

    assert figures["cosine"]["a-b"] == pytest.approx(-0.6)
    assert figures["norm_ratio"]["a-b"] == pytest.approx(5.0)
    assert figures["magnitude_similarity"]["a-b"] == pytest.approx(2 * 5 / 26)
    assert figures["conflict"]["a-b"] == 1


def test_steps_are_averaged_and_absent_tasks_leave_the_average_alone():
    trace = ConflictTrace(2)
    trace.update(gramian((1.0, 0.0), (1.0, 0.0)))  # cosine 1
    trace.update(gramian((1.0, 0.0), (-2.0, 0.0)))  # cosine -1
    weight = [(1 - MEMORY) * MEMORY, 1 - MEMORY]
    expected = (weight[0] - weight[1]) / sum(weight)

    assert pairs(trace.read(), "ab")["cosine"]["a-b"] == pytest.approx(expected)
    assert pairs(trace.read(), "ab")["conflict"]["a-b"] == pytest.approx(weight[1] / sum(weight))
    trace.update(gramian((1.0, 0.0), (0.0, 0.0)))
    assert pairs(trace.read(), "ab")["cosine"]["a-b"] == pytest.approx(expected)


def test_tasks_that_never_met_have_no_figure():
    trace = ConflictTrace(2)
    trace.update(gramian((1.0, 0.0), (0.0, 0.0)))
    assert math.isnan(pairs(trace.read(), "ab")["cosine"]["a-b"])


def test_each_level_has_its_own():
    fine, coarse = gramian((1.0, 0.0), (1.0, 0.0)), gramian((0.0, 2.0), (0.0, -2.0))
    trace = ConflictTrace(2)
    trace.update(fine + coarse, torch.stack([fine, coarse]), [2, 5])
    figures = pairs(trace.read(), "ab")

    assert figures["level2/cosine"]["a-b"] == pytest.approx(1) and figures["level5/cosine"]["a-b"] == pytest.approx(-1)
    assert figures["cosine"]["a-b"] == pytest.approx((1 - 4) / 5) and "level3/cosine" not in figures


@pytest.mark.parametrize("level", ["maps", "parameters"])
def test_a_run_logs_them_and_keeps_them_in_its_checkpoint(tmp_path, level: str):
    from visionmtl.engine.trainer import train

    run = scene_run.run(tmp_path, balance={"type": "upgrad", "level": level})
    train(run)
    figures = scene_run.rows(tmp_path)[-1]["gradients"]

    names = ["detection-segmentation", "detection-depth", "segmentation-depth"]
    assert list(figures["cosine"]) == names and all(-1 <= value <= 1 for value in figures["cosine"].values())
    assert ("level3/cosine" in figures) == (level == "maps")
    saved = torch.load(tmp_path / "checkpoints/last.pt", weights_only=True)["balancer"]["conflict.sums"]
    assert (saved[0, 0] > 0).all()


def test_methods_that_see_no_gradients_log_none(tmp_path):
    from visionmtl.engine.trainer import train

    train(scene_run.run(tmp_path, names=("segmentation", "depth")))
    assert "gradients" not in scene_run.rows(tmp_path)[-1]


def test_a_state_from_before_there_were_traces_begins_an_empty_one():
    trace = ConflictTrace(2)
    trace.load_state_dict({})
    assert not trace.sums.any() and trace.sums.shape == ConflictTrace(2).sums.shape
