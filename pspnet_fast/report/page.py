"""The page: Jinja2 fills its template, Vega-Lite, whole in the page, draws its charts."""

import functools
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import torch
import vl_convert

from pspnet_fast import __version__
from pspnet_fast.files import replacing
from pspnet_fast.report.charts import charts, run_colors
from pspnet_fast.report.pictures import data_uri
from pspnet_fast.report.runs import SCORES, Run, read_runs
from pspnet_fast.training.score_files import RANKS

LAYERS = {"image": "image", "truth": "truth", "prediction": "prediction", "error": "errors"}


def write_page(folders: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in these folders; it needs nothing beside itself, and no network.

    Raises:
        ValueError: a folder is no run, or a file in it is damaged; see :func:`read_runs`.
        OSError: the page cannot be written; nothing of it stays then.
    """
    page = render(read_runs(folders)).encode()
    with replacing(out, len(page)) as file:
        file.write(page)


def render(runs: Sequence[Run]) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pspnet_fast.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(score=_score, value=_value)
    return environment.get_template("page.html").render(
        runs=runs,
        charts=charts(runs),
        summary=_summary(runs),
        classes=_classes(runs),
        measures=_measures(runs),
        galleries={run.name: _gallery(run) for run in runs},
        settings=_settings(runs),
        versions=_versions(runs),
        layers=LAYERS,
        colors=run_colors(runs),
        scores_file=SCORES,
        vega=_vega(),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        by=f"pspnet_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )


@functools.cache
def _vega() -> str:
    """Vega-Lite with all that it needs, as one script."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")


def _summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of (title, a text for each run); those that no run has are left out."""
    rows = [(title, [_of_scores(run, key) for run in runs]) for key, title in _EVALUATED.items()]
    rows.insert(1, ("interval of mIoU", [_interval(run) for run in runs]))
    rows += [
        ("calibration error (ECE)", [_score(((run.scores or {}).get("calibration") or {}).get("ece")) for run in runs]),
        ("images evaluated", [str(len(run.scores["images"])) if run.scores else "-" for run in runs]),
        ("evaluation, images/s", [_number(_time(run, "images_per_second"), 2) for run in runs]),
        ("evaluation, peak memory", [_memory(_time(run, "peak_memory_bytes")) for run in runs]),
        ("best mIoU of the validations", [_best(run) for run in runs]),
        ("mIoU of the last validation", [_score(run.epochs[-1]["miou"]) if run.epochs else "-" for run in runs]),
        ("iterations", [_iterations(run) for run in runs]),
        ("training, images/s", [_number(run.images_per_second, 1) for run in runs]),
    ]
    return [(title, texts) for title, texts in rows if any(text != "-" for text in texts)]


_EVALUATED = {"miou": "mIoU", "macc": "mAcc", "allacc": "allAcc", "fwiou": "fwIoU", "mdice": "mean Dice"}


def _of_scores(run: Run, key: str) -> str:
    return _score(run.scores.get(key)) if run.scores else "-"


def _interval(run: Run) -> str:
    interval = (run.scores or {}).get("miou_interval")
    if not interval:
        return "-"
    return f"{_score(interval['low'])} to {_score(interval['high'])} ({interval['level']:.0%})"


def _time(run: Run, key: str) -> float | None:
    return ((run.scores or {}).get("time") or {}).get(key)


def _best(run: Run) -> str:
    return f"{_score(run.best['miou'])} (epoch {run.best['epoch']:g})" if run.best else "-"


def _iterations(run: Run) -> str:
    return f"{len(run.iterations)} of {run.header['steps']}" if run.header else "-"


def _measures(runs: Sequence[Run]) -> dict[str, str]:
    """What is known of a class of any run, and its title."""
    return {key: title for key, title in _BY_CLASS.items() if key == "iou" or any(map(_by_class(key), runs))}


_BY_CLASS = {"iou": "IoU", "accuracy": "accuracy", "dice": "Dice", "boundary_iou": "boundary IoU"}


def _by_class(key: str) -> Callable[[Run], Mapping[str, float | None]]:
    """What a run tells of this measure, by class name."""
    return lambda run: run.class_iou if key == "iou" else (run.scores or {}).get(key) or {}


def _classes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a class: its name and colour, and of each run the values of :func:`_measures`."""
    names = dict.fromkeys(name for run in runs for name in run.class_names)
    colors = {
        name: "rgb({} {} {})".format(*map(int, color))
        for run in runs
        if run.scores and run.scores.get("colors")
        for name, color in zip(run.scores["classes"], run.scores["colors"], strict=True)
    }
    measures = [_by_class(key) for key in _measures(runs)]
    return [
        {
            "name": name,
            "color": colors.get(name),
            "runs": [[measure(run).get(name) for measure in measures] for run in runs],
        }
        for name in names
    ]


def _gallery(run: Run) -> list[dict[str, Any]]:
    """The run's pictures, best first, each with the addresses of its layers."""
    entries = run.scores["gallery"] if run.scores else []
    folder = (run.folder / SCORES).parent
    shown = []
    for entry in sorted(entries, key=lambda entry: RANKS.index(entry["rank"])):
        layers = {name: data_uri(_inside(folder, entry["files"][name])) for name in LAYERS if name in entry["files"]}
        shown.append({"rank": entry["rank"], "image": entry["image"], "miou": entry["miou"], "layers": layers})
    return shown


def _inside(folder: Path, name: str) -> Path:
    """The file of this name in the folder: scores.json may come from others, and the page is passed on."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / SCORES.name}: the gallery's file {name!r} lies outside its folder")
    return path


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Rows of the configuration and of the protocol of the evaluation."""
    columns = []
    for run in runs:
        header, scores = run.header, run.scores or {}
        evaluation = {key: scores[key] for key in ("config", "checkpoint") if key in scores}
        evaluation |= scores.get("protocol") or {}
        training = {"train": header.get("config"), "model": header.get("model"), "data": header.get("data")}
        columns.append(_flat({**training, "eval": evaluation}))
    return _rows(columns)


def _versions(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Rows of what a run was trained with and on, and of what it was evaluated with."""
    parts = [
        {
            "training": {**run.header.get("versions", {}), **run.header.get("machine", {})},
            "evaluation": (run.scores or {}).get("versions"),
        }
        for run in runs
    ]
    return _rows([_flat(column) for column in parts])


def _flat(parts: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    return {f"{part}.{key}": value for part, values in parts.items() for key, value in (values or {}).items()}


def _rows(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, [_value(column[key]) if key in column else "-" for column in columns]) for key in keys]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _score(value: float | None) -> str:
    return _number(value, 4)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _memory(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f} GB"
