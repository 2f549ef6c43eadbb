"""The report of a run under a memory limit: its arithmetic, its line and its picture, without ComfyUI."""

from __future__ import annotations

import json

import pytest
import torch

from tessera.models.offload import GB, BlockSpan, ModuleSpan, OffloadReport, Split, StepSpan, picture, size, summary


def make_report(**changes) -> OffloadReport:
    """Four blocks of 1 GB and 0.5 GB beside them, 8 GB allowed, two steps of two model calls."""
    blocks = [(f"blocks.{index}", GB) for index in range(4)]
    weights = 4 * GB + GB // 2
    split = Split(8 * GB, 4 * GB, "measured", GB // 2, weights, tuple(nbytes for _, nbytes in blocks))
    report = OffloadReport("auto", "use at most 8 GB", "legacy", split, budget=split.room, weights=weights, resident=2 * GB, blocks=blocks)
    report.model_calls = 4
    for step in range(2):
        report.steps.append(StepSpan(10.0 * step, 10.0 * step + 8))
        for index in range(4):
            start = 10.0 * step + 1 + index
            report.spans.append(BlockSpan(step, index, start, start + 0.5, memory=(5 + index % 2) * GB))
    for name, value in changes.items():
        setattr(report, name, value)
    return report


def add_modules(report: OffloadReport) -> OffloadReport:
    """Two steps of 8 s; in each, four modules that compute 1 s, 1.5 s apart, with copies of 1 s on two streams.

    The first of a run is waited for. After it, each copy has the second and a half since the module before was reached, the first of the
    second step even more: nothing is waited for there.
    """
    report.streams = 2
    for step in range(2):
        for index in range(4):
            start = 10.0 * step + 1.5 * index + (1 if step or index else 0)
            first = step == index == 0
            report.modules.append(ModuleSpan(step, index if index else None, GB, start, start + (1 if not first else 2)))
    return report


def test_split():
    split = make_report().split
    assert split is not None
    assert split.outside == GB // 2
    assert split.room == 3.5 * GB
    assert split.smallest == 4 * GB + GB // 2 + GB // 2 + 2 * GB
    assert Split(GB, 4 * GB, "estimated", 0, GB, ()).room == 0


def test_figures():
    report = make_report(peak=int(7.5 * GB)).as_dict()
    assert report["streamed_bytes"] == 2.5 * GB
    assert report["model_calls_per_step"] == 2
    assert report["copied_bytes_per_step"] == 5 * GB
    assert report["copied_bytes_per_second"] == 5 * GB / 8
    assert report["seconds_per_step"] == 8
    assert report["seconds_per_block"] == [0.5] * 4
    assert report["within_limit"] is True
    assert report["hidden_share"] is None
    assert report["timeline"]["step"] == 1
    assert report["timeline"]["compute"][0] == [0, 1.0, 1.5]
    assert report["timeline"]["memory"][1] == [2.0, 6 * GB]


@pytest.mark.parametrize(("alone", "hidden"), [(8.0, 1.0), (5.5, 0.5), (3.0, 0.0), (9.0, 1.0)])
def test_hidden_share(alone, hidden):
    """5 GB a step at 1 GB/s: what a step lost against one without copies was not hidden."""
    report = make_report(bytes_per_second=float(GB), resident_step_seconds=alone)
    assert report.as_dict()["hidden_share"] == pytest.approx(hidden)


def test_copies_are_predicted_on_the_measured_modules():
    report = add_modules(make_report(bytes_per_second=float(GB)))
    predicted = report.as_dict()["predicted"]
    assert predicted["hidden_share"] == pytest.approx(1.0)
    assert predicted["copied_bytes"] == 4 * GB
    assert predicted["copy_seconds"] == pytest.approx(4.0)
    assert predicted["copies"][0] == pytest.approx([None, -4.5, -3.5, -3.5]), "once the last module of the step before was reached"
    assert predicted["copies"][1] == pytest.approx([1, 1.0, 2.0, 2.0])
    assert json.loads(json.dumps(predicted)) == predicted
    del report.steps[1:], report.modules[4:], report.spans[4:]
    alone = report.as_dict()["predicted"]
    assert alone["hidden_share"] == pytest.approx(0.75), "a run's first copy has nothing to hide behind"
    assert alone["copies"][0] == [None, 0.0, 0.0, 1.0]


class Event:
    """torch.cuda.Event as far as it is read: milliseconds between two, once the device has reached them."""

    def __init__(self, second: float):
        self.second, self.reached = second, False

    def synchronize(self):
        self.reached = True

    def elapsed_time(self, end: Event) -> float:
        return (end.second - self.second) * 1e3


def test_events_of_a_device_give_what_seconds_give():
    expected = add_modules(make_report(bytes_per_second=float(GB))).as_dict()
    report = add_modules(make_report(bytes_per_second=float(GB)))
    timed = (report.steps, report.spans, report.modules)
    for span in (span for spans in timed for span in spans):
        span.start, span.end = Event(span.start), Event(span.end)
    found = report.as_dict()
    assert [spans[-1].end.reached for spans in timed] == [True] * 3
    assert found["predicted"].pop("copies")[1] == pytest.approx(expected["predicted"].pop("copies")[1])
    assert found["predicted"] == pytest.approx(expected["predicted"])


@pytest.mark.parametrize("streams", [0, 1])
def test_without_overlap_no_copy_is_hidden(streams):
    report = add_modules(make_report(bytes_per_second=2.0 * GB))
    report.streams = streams
    figures = report.as_dict()
    assert figures["predicted"]["hidden_share"] == 0
    assert figures["predicted"]["wait_seconds"] == pytest.approx(2.0)
    assert "predicted: 0% of the copies hidden" in summary(figures)


def test_predicted_and_measured_share_stand_beside_each_other():
    report = add_modules(make_report(bytes_per_second=float(GB), resident_step_seconds=5.5))
    assert "50% of the copies hidden, predicted 100%" in summary(report.as_dict())
    report.resident_step_seconds = None
    assert "predicted: 100% of the copies hidden" in summary(report.as_dict())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bytes_per_second": None}, "not predicted: the rate of the link was not measured"),
        ({"modules": []}, "not predicted: no step has times of its modules"),
        ({"spans": []}, "not predicted: no step has times of its modules"),
        ({"resident": make_report().weights}, "none: every weight stays where it is"),
        ({"no_effect": "on several GPUs"}, "not predicted: on several GPUs"),
        ({"no_effect": "on the CPU", "copies_unknown": "none: there is no link"}, "none: there is no link"),
    ],
)
def test_a_prediction_without_its_inputs_says_which_is_missing(changes, reason):
    report = add_modules(make_report(bytes_per_second=float(GB)))
    assert report.as_dict()["predicted_missing"] is None
    for name, value in changes.items():
        setattr(report, name, value)
    figures = report.as_dict()
    assert (figures["predicted"], figures["predicted_missing"]) == (None, reason)
    assert "predicted" not in summary(figures)
    assert not orange(figures).any()


def orange(figures: dict) -> torch.Tensor:
    """Columns of the row of copies where the device is drawn waiting."""
    row = picture(figures, "")[0, 58 + 26 + 12 + 2]
    return (row[:, 0] > 0.8) & (row[:, 2] < 0.3)


def test_the_picture_shows_what_was_waited_for():
    """2 of 8 s of waiting: a quarter of the time axis is orange."""
    report = add_modules(make_report(bytes_per_second=2.0 * GB))
    report.streams = 1
    assert int(orange(report.as_dict()).sum()) == pytest.approx((760 - 14 - 90) / 4, abs=8)
    report.streams = 2
    assert not orange(report.as_dict()).any()


def test_line():
    assert (
        summary(make_report(peak=int(7.8 * GB)).as_dict())
        == "weights 2.0 of 4.5 GB resident, 5.0 GB streamed a step, peak 7.8 of 8.0 GB · 8 s a step"
    )
    assert "over the limit" in summary(make_report(peak=9 * GB).as_dict())
    assert "use at most 8 GB leaves 3.5 GB for weights" in summary(make_report().as_dict())
    assert "nothing streamed" in summary(make_report(resident=make_report().weights).as_dict())
    line = summary(make_report(no_effect="this model runs on the CPU", backend="none").as_dict())
    assert line == "use at most 8 GB had no effect: this model runs on the CPU · weights 4.5 GB"


def test_an_interrupted_run_is_reported():
    """The step and the block that were running have no end."""
    report = make_report()
    report.steps.append(StepSpan(20.0))
    report.spans.append(BlockSpan(2, 0, 20.5))
    figures = report.as_dict()
    assert figures["steps"] == 3
    assert figures["seconds_per_step"] == 8
    assert summary(figures)


def test_a_run_that_never_began_is_reported():
    figures = OffloadReport("auto", "use at most 8 GB").as_dict()
    assert figures["timeline"] is figures["seconds_per_step"] is figures["limit_bytes"] is None
    assert summary(figures)
    assert picture(figures, "").shape[0] == 1


@pytest.mark.parametrize("changes", [{}, {"peak": 9 * GB}, {"spans": []}, {"steps": [], "spans": []}, {"no_effect": "on a CPU", "split": None}])
def test_picture(changes):
    figures = make_report(**changes).as_dict()
    image = picture(figures, summary(figures))
    assert image.shape == (1, 296, 760, 3)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1


def test_memory_over_the_limit_is_drawn_above_the_line():
    """Red limit line: its row moves down when the measured memory needs the room above."""

    def limit_row(report: OffloadReport) -> int:
        image = picture(report.as_dict(), "")[0]
        red = (image[:, 400, 0] > 0.7) & (image[:, 400, 1] < 0.4)
        return int(red.nonzero()[0])

    assert limit_row(make_report(peak=16 * GB)) > limit_row(make_report(peak=7 * GB))


def test_sizes_for_readers():
    assert [size(n) for n in (0, 3 * 1024**2, 300 * 1024**2, GB, 8 * GB)] == ["0 MB", "3.0 MB", "300 MB", "1.0 GB", "8.0 GB"]
