"""The report of an attention patch, from literal records: every figure is worked out by hand here, every line is an exact string."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tessera.models.patchers.report import (
    HOST,
    LINE,
    QUANTIZED,
    SPARSE,
    AttentionReport,
    CallRecord,
    ModelCallRecord,
    clock,
    heat_map,
    summary,
)

SHAPE = (1, 2, 2, 100, 16)


def record(outcome, *, step=0, layer=0, shape=SHAPE, start=0.0, seconds=1.0, kept=None, pairs=1, in_window=None, reason=None, backend=None):
    kept = None if kept is None else torch.tensor(kept)
    in_window = outcome == SPARSE if in_window is None else in_window
    backend = "torch/native" if outcome == SPARSE and backend is None else backend
    return CallRecord(step, layer, shape, outcome, start, start + seconds, kept, pairs, in_window, reason, backend)


def report_of(*records, model_calls=(), **fields):
    return AttentionReport(
        fields.pop("method", "sparge"), fields.pop("precision", "native"), records=list(records), model_calls=list(model_calls), **fields
    )


def dense(**changes):
    return record(HOST, **{"reason": "outside the sparse steps", **changes})


def sparse(**changes):
    return record(SPARSE, **{"kept": 30, "pairs": 100, **changes})


def looked(call):
    call.search = (20.0, 21.5)
    return call


def guarded(call, load, predicted, error):
    call.load, call.predicted, call.error = torch.tensor(load), predicted, error
    return call


def model_call(seconds, *calls):
    return ModelCallRecord(10.0, 10.0 + seconds, list(calls))


def test_every_figure_of_a_run():
    records = [
        dense(seconds=4.0),
        dense(layer=1, seconds=2.0, reason="dense block"),
        sparse(step=1, seconds=0.5, kept=30, pairs=100),
        sparse(step=1, layer=1, seconds=1.5, kept=10, pairs=40, shape=(2, 2, 1, 200, 16), backend="triton/int8"),
        record(QUANTIZED, step=2, layer=1, seconds=0.25, reason="only 20 tokens", shape=(1, 2, 2, 20, 16), backend="triton/int8"),
        dense(step=2, layer=None, seconds=0.75, reason="another length than the video's", in_window=True, shape=(1, 2, 2, 50, 16)),
    ]
    report = report_of(
        *records,
        density=0.3,
        error=0.07,
        mask_bytes={"device": 5, "host": 6},
        family="Wan",
        refusals={"triton/fp16": "no GPU"},
        notes=Counter({"4 steps": 1}),
        repeated=2,
        other=Counter({"cross-attention": 6}),
    )
    records[0].search = (20.0, 21.5)
    records[2].predicted, records[2].error = 0.06, 0.08
    records[3].load, records[3].predicted, records[3].error = torch.tensor(0.375), 0.1, 0.05
    work = [2 * 100**2, 2 * 100**2, 2 * 100**2, 4 * 200**2, 2 * 20**2, 2 * 50**2]  # batch x heads x tokens squared
    densities = [1, 1, 0.3, 0.25, 1, 1]
    loads = [1, 1, 0.3, 0.375, 1, 1]

    def root_mean_square(first, second):
        return pytest.approx(((first**2 * work[2] + second**2 * work[3]) / (work[2] + work[3])) ** 0.5)

    assert report.as_dict() == {
        "method": "sparge",
        "family": "Wan",
        "asked_density": 0.3,
        "precision": "native",
        "self_attention_calls": 6,
        "calls": {HOST: 3, SPARSE: 2, QUANTIZED: 1},
        "calls_in_window": 3,
        "sparse_share_in_window": pytest.approx(2 / 3),
        "density": pytest.approx((0.3 * work[2] + 0.25 * work[3]) / (work[2] + work[3])),
        "overall_density": pytest.approx(sum(d * w for d, w in zip(densities, work, strict=True)) / sum(work)),
        "work": pytest.approx((0.3 * work[2] + 0.375 * work[3]) / (work[2] + work[3])),
        "overall_work": pytest.approx(sum(d * w for d, w in zip(loads, work, strict=True)) / sum(work)),
        "asked_error": 0.07,
        "error": root_mean_square(0.08, 0.05),
        "predicted_error": root_mean_square(0.06, 0.1),
        "errors": [[1, 0, 0.06, 0.08], [1, 1, 0.1, 0.05]],
        "searches": 1,
        "search_seconds": 1.5,
        "mask_bytes": {"device": 5, "host": 6},
        "backends": {"torch/native": 1, "triton/int8": 2},
        "refusals": {"triton/fp16": "no GPU"},
        "reasons": {"outside the sparse steps": 1, "dense block": 1, "only 20 tokens": 1, "another length than the video's": 1, "cross-attention": 6},
        "main_reason": "another length than the video's (1)",
        "notes": {"4 steps": 1},
        "repeated_model_calls": 2,
        "attention_seconds": 9.0,
        "speedup_per_call": None,
        "speedup_per_model_call": None,
        "density_by_step_and_layer": [[1.0, 1.0], [pytest.approx(0.3), 0.25], [None, 1.0]],
    }


def test_cells_of_the_map_are_means_over_the_calls_of_a_step_and_layer():
    report = report_of(sparse(kept=20), sparse(kept=40), dense(layer=2))
    assert report.as_dict()["density_by_step_and_layer"] == [[pytest.approx(0.3), None, 1.0]]


@pytest.mark.parametrize("density", [0.0, 0.004, 0.996, 1.0])
def test_density_is_not_rounded_or_capped(density):
    assert report_of(sparse(kept=round(density * 1000), pairs=1000)).as_dict()["density"] == pytest.approx(density)


def test_a_run_that_was_stopped_after_a_look_waits_for_it():
    """On a GPU a time is read only when the device is that far; nothing came after the look that would be waited for."""

    class Event:
        reached = 0

        def __init__(self, place):
            self.place = place

        def synchronize(self):
            Event.reached = max(Event.reached, self.place)

        def elapsed_time(self, end):
            assert end.place <= Event.reached, "not ready"
            return 1e3 * (end.place - self.place)

    call = dense()
    call.start, call.end = Event(1), Event(2)
    call.search = call.end, Event(5)
    assert report_of(call).as_dict()["search_seconds"] == 3.0


def test_an_empty_run_has_no_shares():
    report = report_of().as_dict()
    assert (report["density"], report["overall_density"], report["sparse_share_in_window"], report["main_reason"]) == (None,) * 4
    assert report["density_by_step_and_layer"] == []
    assert report["calls"] == {}
    assert (report["asked_density"], report["repeated_model_calls"]) == (1.0, 0)


# The line

WARM_UP = model_call(100.0, dense(seconds=50.0))
LINES = {
    "a search and its errors": (
        report_of(
            looked(dense(reason="outside the sparse steps")),
            guarded(sparse(kept=20, step=1), 0.3, 0.07, 0.06),
            method="tessera",
            mask_bytes={"device": 2_300_000, "host": 40_000_000},
        ),
        "tessera on torch/native · 1 of 2 self-attention calls sparse · density 0.20, work 0.30 with its tail (overall 0.65) · "
        "error 6.0%, predicted 7.0% · 1 calls looked at in 1.50 s, masks 2.3 MB and 40.0 MB in host memory · outside the sparse steps (1)",
    ),
    "an error that was asked for": (
        report_of(guarded(sparse(kept=20), 0.3, 0.07, 0.061), method="tessera", error=0.08),
        "tessera on torch/native · 1 of 1 self-attention calls sparse · density 0.20, work 0.30 with its tail (overall 0.30) · error 6.1%, asked 8%",
    ),
    "nothing reached the patch": (
        report_of(other=Counter({"cross-attention": 9, "attention: v has shape (1, 2)": 2})),
        "sparge: not accelerated, no self-attention call reached the patch: cross-attention (9)",
    ),
    "nothing at all": (report_of(), "sparge: not accelerated, no self-attention call reached the patch: this model does not pass its calls on"),
    "nothing was sparse": (
        report_of(dense(), dense(), dense(reason="dense block")),
        "sparge: not accelerated · 0 of 3 self-attention calls sparse · outside the sparse steps (2)",
    ),
    "only dense quantized": (
        report_of(record(QUANTIZED, reason="density 1", backend="triton/int8"), record(QUANTIZED, reason="density 1", backend="triton/int8")),
        "sparge on triton/int8 · 0 of 2 self-attention calls sparse · 2 dense quantized · density 1 (2)",
    ),
    "all sparse": (report_of(sparse(kept=25)), "sparge on torch/native · 1 of 1 self-attention calls sparse · density 0.25 (overall 0.25)"),
    "two backends": (
        report_of(sparse(kept=20), sparse(kept=20, backend="triton/int8"), sparse(kept=20), dense()),
        "sparge on torch/native, triton/int8 · 3 of 4 self-attention calls sparse · density 0.20 (overall 0.40) · outside the sparse steps (1)",
    ),
    "the reason that kept most of those that could have been": (
        report_of(
            *[dense()] * 6,
            *[dense(in_window=True, reason="attention mask that differs between queries")] * 3,
            *[dense(in_window=True, reason="unknown model family")] * 4,
        ),
        "sparge: not accelerated · 0 of 13 self-attention calls sparse · unknown model family (4)",
    ),
    "a gain": (
        report_of(sparse(), model_calls=[WARM_UP, model_call(6.0, dense(seconds=3.0)), model_call(4.0, sparse(seconds=1.0))]),
        "sparge on torch/native · 1 of 1 self-attention calls sparse · density 0.30 (overall 0.30) · "
        "model call 1.50x as fast as dense (sparse attention call 3.00x)",
    ),
    "neither gain nor loss": (
        report_of(sparse(), model_calls=[WARM_UP, model_call(4.0, dense(seconds=3.0)), model_call(4.0, sparse(seconds=1.0))]),
        "sparge on torch/native · 1 of 1 self-attention calls sparse · density 0.30 (overall 0.30) · "
        "model call 1.00x as fast as dense (sparse attention call 3.00x)",
    ),
    "a loss": (
        report_of(sparse(), model_calls=[WARM_UP, model_call(4.0, dense(seconds=3.0)), model_call(5.0, sparse(seconds=1.0))]),
        "sparge on torch/native · 1 of 1 self-attention calls sparse · density 0.30 (overall 0.30) · "
        "no gain in time: model call 0.80x as fast as dense",
    ),
    "three notes of four": (
        report_of(sparse(), notes=Counter(["4 steps", "int8 is not available here", "non-finite output", "another"])),
        "sparge on torch/native · 1 of 1 self-attention calls sparse · density 0.30 (overall 0.30) · "
        "4 steps · int8 is not available here · non-finite output",
    ),
}


@pytest.mark.parametrize(("report", "line"), LINES.values(), ids=LINES)
def test_the_line_on_the_node(report, line):
    assert summary(report.as_dict()) == line


@pytest.mark.parametrize("page", ["TesseraAccelerate", "TesseraSparseAttention"])
def test_the_help_pages_example_is_a_line_of_ours(root, page):
    calls = [*[guarded(sparse(kept=23), 0.27, 0.057, 0.059)] * 90, *[looked(dense())] * 6, *[dense()] * 24]
    times = [WARM_UP, model_call(1.31, dense(seconds=2.08)), model_call(1.0, sparse(seconds=1.0))]
    line = summary(report_of(*calls, model_calls=times, method="tessera", error=0.06, mask_bytes={"device": 5832, "host": 0}).as_dict())
    assert f"`{line}`" in (root / "web" / "docs" / f"{page}.md").read_text().replace("\n", " ")


# Times

DOUBLE = (2, 2, 2, 100, 16)


def speedups(*model_calls):
    report = report_of(*(call for part in model_calls for call in part.calls), model_calls=model_calls).as_dict()
    return report["speedup_per_call"], report["speedup_per_model_call"]


def test_calls_are_compared_with_calls_of_their_own_shape():
    """The dense steps ran with guidance in one batch of two, the sparse ones without: there is nothing to compare."""
    batch_2 = model_call(4.0, dense(shape=DOUBLE, seconds=2.0))
    batch_1 = model_call(2.0, sparse(seconds=1.0))
    assert speedups(WARM_UP, batch_2, batch_2, batch_1, batch_1) == (None, None)
    assert speedups(WARM_UP, batch_2, batch_1, model_call(1.0, dense(seconds=0.5))) == (0.5, 0.5)


def test_medians_are_compared_and_the_first_model_call_is_left_out():
    dense_calls = [model_call(seconds, dense(seconds=seconds / 2), dense(layer=1, seconds=seconds / 2)) for seconds in (8.0, 4.0, 90.0)]
    sparse_calls = [model_call(seconds, sparse(seconds=seconds / 4), sparse(layer=1, seconds=seconds / 4)) for seconds in (2.0, 70.0, 1.0)]
    assert speedups(*dense_calls[:1], *sparse_calls) == (None, None)
    assert speedups(WARM_UP, *dense_calls, *sparse_calls) == (8.0, 4.0)


def test_shapes_that_had_both_kinds_share_one_median():
    calls = [dense(seconds=2.0), sparse(seconds=1.0), dense(shape=DOUBLE, seconds=9.0), sparse(shape=DOUBLE, seconds=3.0)]
    assert speedups(WARM_UP, model_call(5.0, *calls)) == (2.5, None)


def test_a_model_call_is_dense_only_if_all_of_it_was_the_hosts():
    mixed = model_call(9.0, dense(), record(QUANTIZED, seconds=1.0, backend="triton/int8"))
    half = model_call(2.0, dense(seconds=1.0), sparse(layer=1, seconds=0.5))
    assert speedups(WARM_UP, mixed, half) == (2.0, None)
    assert speedups(WARM_UP, model_call(3.0, dense(seconds=1.0), dense(layer=1, seconds=1.0)), half) == (2.0, 1.5)


def test_quantized_calls_are_no_dense_calls():
    """They are compared with nothing: what they cost is not what the host's own attention costs."""
    quantized = model_call(1.0, record(QUANTIZED, seconds=9.0, backend="triton/int8"))
    faster = model_call(1.0, sparse(seconds=1.0))
    assert speedups(WARM_UP, quantized, faster) == (None, None)
    assert speedups(WARM_UP, quantized, faster, model_call(1.0, dense(seconds=3.0)))[0] == 3.0


class Event:
    """A CUDA event: milliseconds on the device's time line, which may be read when it has been waited for."""

    def __init__(self, enable_timing=False):
        assert enable_timing
        self.time, self.waited = None, False

    def record(self):
        self.time = 0.0

    def at(self, milliseconds):
        self.time = milliseconds
        return self

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, other):
        return other.time - self.time


def test_times_on_a_gpu_are_events_that_are_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    event = clock(torch.device("cuda", 0))
    assert isinstance(event, Event) and event.time == 0.0
    calls, model_calls = [], []
    for seconds in (3.0, 2.0, 1.0):
        call = record(HOST, reason="density 1")
        call.start, call.end = event, Event(True).at(1e3 * seconds)
        calls.append(call)
        model_calls.append(ModelCallRecord(event, Event(True).at(2e3 * seconds), [call]))
    assert report_of(*calls, model_calls=model_calls).as_dict()["attention_seconds"] == 6.0
    assert model_calls[0].seconds == 6.0
    # The last of a stream is the last of all.
    assert [part.end.waited for part in (*calls, *model_calls)] == [False, False, True] * 2


# The picture


def test_the_picture():
    """Drawn again here, from numbers: text, a row for each step, a column for each layer, the legend."""
    run = report_of(dense(), sparse(layer=1, kept=0), sparse(step=1, kept=50))
    expected = Image.new("RGB", (330, 102), (24, 24, 28))
    draw = ImageDraw.Draw(expected)
    white, dim = (230, 230, 230), (170, 170, 170)
    draw.text((6, 2), "sparge   density of sparse calls: 0.25 (0.50 overall)", fill=white)
    draw.text((6, 16), "not sparse: outside the sparse steps (1)", fill=white)
    draw.text((6, 34), "step     layer 0 ...", fill=dim)
    draw.text((6, 48), "0", fill=dim)
    draw.text((6, 62), "1", fill=dim)
    for corner, colour in (((44, 48), (252, 236, 170)), ((58, 48), (20, 28, 84)), ((44, 62), (190, 74, 62)), ((58, 62), (70, 70, 74))):
        draw.rectangle((*corner, corner[0] + 12, corner[1] + 12), fill=colour)
    x = 6
    legend = {
        "0": (20, 28, 84),
        "0.25": (105, 51, 73),
        "0.5": (190, 74, 62),
        "0.75": (221, 155, 116),
        "1 dense": (252, 236, 170),
        "no call": (70, 70, 74),
    }
    for label, colour in legend.items():
        draw.rectangle((x, 82, x + 11, 93), fill=colour)
        draw.text((x + 16, 82), label, fill=dim)
        x += 22 + round(draw.textlength(label))
    picture = heat_map(run.as_dict())
    assert picture.dtype == torch.float32
    assert torch.equal(picture, torch.from_numpy(np.asarray(expected) / np.float32(255))[None])


@pytest.mark.parametrize(("columns", "width"), [(19, 330), (20, 332), (40, 612)])
def test_the_picture_is_as_wide_as_its_columns(columns, width):
    report = report_of(*(sparse(layer=layer) for layer in range(columns))).as_dict()
    assert heat_map(report).shape == (1, 6 + 14 * 3 + 14 + 6 + 20, width, 3)
    assert heat_map(report, cell=7).shape == (1, 6 + 14 * 3 + 7 + 6 + 20, max(330, 52 + 7 * columns), 3)


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (report_of(), "no call"),
        (report_of(sparse()), "every call was sparse"),
        (report_of(other=Counter({"cross-attention": 3})), "not sparse: cross-attention (3)"),
        (report_of(dense(reason="a reason that is longer than what one line can hold")), "not sparse: a reason that is longer than what one"),
        (report_of(dense(reason="a reason as long as one line can be.")), "not sparse: a reason as long as one line can be. (1)"),
        (report_of(dense(reason="a reason as long as one line can be..")), "not sparse: a reason as long as one line can be.."),
    ],
    ids=["nothing", "all", "cross-attention", "long", "52 characters", "53 characters"],
)
def test_the_picture_says_what_was_not_sparse(run, line):
    picture = heat_map(run.as_dict())
    expected = Image.new("RGB", (330, 14), (24, 24, 28))
    ImageDraw.Draw(expected).text((6, 2), line, fill=(230, 230, 230))
    assert torch.equal(picture[0, LINE : 2 * LINE, 6:], torch.from_numpy(np.asarray(expected) / np.float32(255))[:, 6:])


def test_a_call_of_which_nothing_more_is_known():
    bare = CallRecord(0, 0, (3, 5, 1, 7, 16), HOST, 0.0, 1.0)
    assert (bare.kept, bare.in_window, bare.reason, bare.backend) == (None, False, None, None)
    assert bare.work == 3 * 5 * 7 * 7
    assert report_of(bare).as_dict()["overall_density"] == 1.0


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "meta"])
def test_the_clock_of_what_is_not_cuda_is_the_host_s(device):
    assert isinstance(clock(torch.device(device)), float)


def test_the_clock_of_a_cpu_counts_seconds():
    first, second = clock(torch.device("cpu")), clock(torch.device("cpu"))
    assert 0 <= second - first < 1
    assert record(HOST, start=first, seconds=2.0).seconds == pytest.approx(2.0)
