"""The charts as Vega-Lite describes them: data and how they are shown.

Colours are the page's CSS variables, so that one drawing serves light, dark and paper. Names of classes and runs stand
in the data only, never in an expression or as a field.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pspnet_fast.report.runs import Run
from pspnet_fast.training.report import SCORES

Chart = dict[str, Any]
Rows = list[dict[str, Any]]

POINTS = 400  # of a curve: what a screen can show
FAINT = 0.001  # share of a label's pixels up to which a cell of the confusion matrix is not drawn
ARIA = 1000  # marks of a chart that a screen reader is told one by one
FEW = {"tickCount": 6}
STROKE = {"symbolType": "stroke", "symbolStrokeColor": "var(--text)"}  # of a legend of dashes
COLORS = 8  # that the style sheet defines; further runs take them again


def charts(runs: Sequence[Run]) -> dict[str, Chart]:
    """All charts for which the runs have data, by the name of their place in the page."""
    names = [run.name for run in runs]
    found = {
        "loss": _curve(_losses(runs), names, "iteration", "loss", "training loss"),
        "lr": _curve(_rates(runs), names, "iteration", "lr", "learning rate of the backbone", ".3g"),
        "scores": _scores(runs, names),
        "speed": _speed(runs, names),
        "times": _times(runs),
        "iou": _class_iou(runs, names),
        "calibration": _calibration(runs, names),
        "confidence": _confidence(runs, names),
    }
    for number, run in enumerate(runs):
        if run.scores:
            found[f"confusion-{number}"] = _confusion(run.scores["classes"], run.scores["confusion"])
    return {name: chart for name, chart in found.items() if chart["data"]["values"]}


def run_colors(runs: Sequence[Run]) -> dict[str, str]:
    """The colour of each run, by its name, as CSS has it."""
    return {run.name: _run_color(number) for number, run in enumerate(runs)}


def _run_color(number: int) -> str:
    return f"var(--run-{number % COLORS + 1})"


def _losses(runs: Sequence[Run]) -> Rows:
    """Means of consecutive iterations: all iterations where they are few."""
    rows = []
    for run in runs:
        for part in _parts(run.iterations):
            losses = [record["loss"] for record in part if record["loss"] is not None]
            mean = sum(losses) / len(losses) if losses else None
            rows.append({"run": run.name, "iteration": part[-1]["step"], "loss": mean, "of": len(part)})
    return rows


def _rates(runs: Sequence[Run]) -> Rows:
    lasts = ((run.name, part[-1]) for run in runs for part in _parts(run.iterations))
    return [{"run": name, "iteration": record["step"], "lr": record["lr"]} for name, record in lasts]


def _parts(records: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    step = -(-len(records) // POINTS) or 1
    return [records[start : start + step] for start in range(0, len(records), step)]


def _curve(rows: Rows, names: Sequence[str], x: str, y: str, title: str, format: str = ".4f") -> Chart:
    tooltip = [_field("run"), _field(x), _field(y, title, format)]
    if rows and "of" in rows[0]:
        tooltip.append(_field("of", "mean of iterations"))
    return {
        **_base(rows, f"{title} by {x}"),
        "mark": {"type": "line", "interpolate": "linear", "point": {"size": 60, "opacity": 0}, "aria": False},
        "encoding": {
            "x": {"field": x, "type": "quantitative", "axis": {"tickMinStep": 1, "tickCount": 8, "format": "~s"}},
            "y": {"field": y, "type": "quantitative", "title": title},
            "color": _color(names),
            "tooltip": tooltip,
        },
    }


def _scores(runs: Sequence[Run], names: Sequence[str]) -> Chart:
    rows = [
        {"run": run.name, "epoch": record["epoch"], "score": title, "value": record[name]}
        for run in runs
        for record in run.epochs
        for name, title in SCORES.items()
    ]
    order = list(SCORES.values())
    return {
        **_base(rows, "validation scores by epoch"),
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {"field": "epoch", "type": "quantitative", "axis": {"tickMinStep": 1}},
            "y": {"field": "value", "type": "quantitative", "title": "score", "scale": {"domain": [0, 1]}},
            "color": _color(names),
            "strokeDash": {"field": "score", "type": "nominal", "scale": {"domain": order}, "legend": STROKE},
            "tooltip": [_field("run"), _field("epoch"), _field("score"), _field("value", format=".4f")],
        },
    }


def _speed(runs: Sequence[Run], names: Sequence[str]) -> Chart:
    rows = [
        {"run": run.name, "epoch": record["epoch"], "speed": record["images_per_second"]}
        for run in runs
        for record in run.epochs
    ]
    chart = _curve(rows, names, "epoch", "speed", "images per second of training", ".1f")
    return {**chart, "mark": {"type": "line", "point": True}}


def _times(runs: Sequence[Run]) -> Chart:
    rows = [
        {"run": run.name, "part": part, "place": place, "milliseconds": 1000 * seconds, "share": seconds / total}
        for run in runs
        if (total := sum(run.seconds_per_image.values()))
        for place, (part, seconds) in enumerate(run.seconds_per_image.items())
    ]
    parts = list(dict.fromkeys(row["part"] for row in rows))
    colors = [f"var(--part-{number % COLORS + 1})" for number in range(len(parts))]
    return {
        **_base(rows, "time of an image in each part of the training, by run"),
        "height": 34 * len({row["run"] for row in rows}),
        "mark": {"type": "bar"},
        "encoding": {
            "y": {"field": "run", "type": "nominal", "sort": None, "title": None},
            "x": {"field": "milliseconds", "type": "quantitative", "title": "milliseconds an image", "axis": FEW},
            "color": {"field": "part", "type": "nominal", "sort": parts, "scale": {"domain": parts, "range": colors}},
            "order": {"field": "place"},
            "tooltip": [
                _field("run"),
                _field("part"),
                _field("milliseconds", "milliseconds an image", ".2f"),
                _field("share", format=".1%"),
            ],
        },
    }


def _class_iou(runs: Sequence[Run], names: Sequence[str]) -> Chart:
    rows = [
        {"run": run.name, "class": name, "iou": iou}
        for run in runs
        for name, iou in run.class_iou.items()
        if iou is not None
    ]
    best: dict[str, float] = {}
    for run in runs:
        for name, iou in run.class_iou.items():
            if iou is not None:
                best[name] = max(iou, best.get(name, 0.0))
    order = sorted(best, key=lambda name: -best[name])
    return {
        **_base(rows, "IoU by class"),
        "height": max(20, 10 * len(names)) * len(order),
        "mark": {"type": "bar"},
        "encoding": {
            "y": {"field": "class", "type": "nominal", "sort": order, "title": None, "axis": {"labelLimit": 160}},
            **({"yOffset": {"field": "run", "sort": list(names)}} if len(names) > 1 else {}),
            "x": {"field": "iou", "type": "quantitative", "title": "IoU", "scale": {"domain": [0, 1]}, "axis": FEW},
            "color": _color(names),
            "tooltip": [_field("run"), _field("class"), _field("iou", "IoU", ".4f")],
        },
    }


def _confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Chart:
    """Shares of each label's pixels, in a cell's opacity; cells that nobody could see are left out.

    Of many classes there are thousands of cells, so their rows hold numbers only: the names are looked up.
    """
    totals = [sum(row) for row in counts]
    rows = [
        {"row": label, "column": prediction, "pixels": pixels}
        for label, row in enumerate(counts)
        for prediction, pixels in enumerate(row)
        if pixels > FAINT * totals[label]
    ]

    def named(index: str, name: str) -> dict[str, Any]:
        values = [{"index": number, name: text, "total": totals[number]} for number, text in enumerate(classes)]
        fields = [name, "total"] if name == "label" else [name]
        return {"lookup": index, "from": {"data": {"values": values}, "key": "index", "fields": fields}}

    step = max(6, min(34, 640 // max(len(classes), 1)))
    axis = {"labelLimit": 130, "labelOverlap": step < 10, "ticks": False, "labelFontSize": min(12, max(step, 8))}
    place = {"type": "nominal", "sort": None, "scale": {"domain": list(classes), "padding": 0.04}}
    return {
        **_base(rows, "confusion matrix"),
        "width": {"step": step},
        "height": {"step": step},
        "view": {"stroke": "var(--line)"},
        "mark": {"type": "rect", "aria": len(rows) <= ARIA},
        "transform": [
            named("row", "label"),
            named("column", "prediction"),
            {"calculate": "datum.pixels / datum.total", "as": "share"},
            {"calculate": "datum.row === datum.column", "as": "right"},
        ],
        "encoding": {
            "y": {"field": "label", "axis": axis, **place},
            "x": {"field": "prediction", "axis": {**axis, "labelAngle": -60, "orient": "top"}, **place},
            "color": {
                "field": "right",
                "type": "nominal",
                "scale": {"domain": [True, False], "range": ["var(--right)", "var(--wrong)"]},
                "legend": None,
            },
            "fillOpacity": {  # the root, or shares of some hundredths could not be seen
                "field": "share",
                "type": "quantitative",
                "scale": {"type": "sqrt", "domain": [0, 1], "range": [0, 1]},
                "legend": None,
            },
            "tooltip": [
                _field("label"),
                _field("prediction"),
                _field("share", "share of the label's pixels", ".2%"),
                _field("pixels", format=",d"),
            ],
        },
    }


def _bins(runs: Sequence[Run]) -> Rows:
    rows = []
    for run in runs:
        known = run.scores.get("calibration") if run.scores else None
        if not known:
            continue
        total = sum(known["count"]) or 1
        columns = (known["edges"], known["edges"][1:], known["count"], known["confidence"], known["accuracy"])
        for low, high, count, confidence, accuracy in zip(*columns, strict=False):
            values = {"low": low, "high": high, "pixels": count, "share": count / total}
            rows.append({"run": run.name, **values, "confidence": confidence, "accuracy": accuracy})
    return rows


def _calibration(runs: Sequence[Run], names: Sequence[str]) -> Chart:
    rows = [row for row in _bins(runs) if row["pixels"]]
    axis = {"type": "quantitative", "scale": {"domain": [0, 1]}, "axis": FEW}
    tooltip = [
        _field("run"),
        _field("confidence", "mean confidence", ".4f"),
        _field("accuracy", format=".4f"),
        _field("pixels", format=",d"),
    ]
    return {
        **_base(rows, "accuracy by confidence of the predicted class"),
        "layer": [
            {
                "data": {"values": [{"at": 0}, {"at": 1}]},
                "mark": {"type": "line", "strokeDash": [4, 4], "color": "var(--muted)", "aria": False},
                "encoding": {"x": {"field": "at", **axis}, "y": {"field": "at", **axis}},
            },
            {
                "mark": {"type": "line", "point": True},
                "encoding": {
                    "x": {"field": "confidence", "title": "mean confidence", **axis},
                    "y": {"field": "accuracy", "title": "accuracy", **axis},
                    "color": _color(names),
                    "tooltip": tooltip,
                },
            },
        ],
    }


def _confidence(runs: Sequence[Run], names: Sequence[str]) -> Chart:
    return {
        **_base(_bins(runs), "share of the pixels by confidence of the predicted class"),
        "mark": {"type": "line", "interpolate": "step", "point": {"size": 60, "opacity": 0}},
        "transform": [{"calculate": "(datum.low + datum.high) / 2", "as": "middle"}],
        "encoding": {
            "x": {
                "field": "middle",
                "type": "quantitative",
                "title": "confidence",
                "scale": {"domain": [0, 1]},
                "axis": FEW,
            },
            "y": {"field": "share", "type": "quantitative", "title": "share of the pixels", "axis": {"format": "%"}},
            "color": _color(names),
            "tooltip": [
                _field("run"),
                _field("low", "from", ".3f"),
                _field("high", "to", ".3f"),
                _field("share", format=".2%"),
                _field("pixels", format=",d"),
            ],
        },
    }


def _base(rows: Rows, description: str) -> Chart:
    size = {"width": "container", "height": 260}
    return {"description": description, "data": {"values": rows}, **size}


def _color(names: Sequence[str]) -> dict[str, Any]:
    """A run's colour is the same in every chart; a legend only where there are several."""
    colors = [_run_color(number) for number in range(len(names))]
    legend = {} if len(names) > 1 else {"legend": None}
    return {"field": "run", "type": "nominal", "scale": {"domain": list(names), "range": colors}, **legend}


def _field(name: str, title: str | None = None, format: str | None = None) -> dict[str, Any]:
    return {"field": name, "title": title or name, **({"format": format} if format else {})}
