"""``pspnet-fast check-data``."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pspnet_fast.cli.common import FILE, FOLDER, pair_dataset, read_classes

if TYPE_CHECKING:
    from pspnet_fast.data.list_dataset import PairDataset
    from pspnet_fast.data.survey import Summary
    from pspnet_fast.training.config import DataConfig

FILES = ("files.csv", "classes.png", "samples.png")
SHOWN = 10  # problems that are printed of each part
SAMPLES = 4  # pairs that are drawn


@click.command("check-data", short_help="Read every image and label that CONFIG names; tell what is wrong.")
@click.argument("config", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=FOLDER, help="Folder for files.csv (a line a file), classes.png and samples.png.")
@click.option("--overwrite", is_flag=True, help="Replace these files where they exist.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--sample", type=click.IntRange(min=1), help="Read so many pairs of each part only, evenly spread.")
def check_data(
    config: Path, overrides: tuple[str, ...], out: Path | None, overwrite: bool, as_json: bool, sample: int | None
) -> None:
    """Read every image and label of the training and the validation part of CONFIG, and say what is in them.

    It counts images, sizes and the pixels of each class, and finds files that are missing, cannot be read or differ in
    size, and label values that are no class, in each file. It suggests train.class_weights (median frequency balancing:
    docs/data.md) and data.crop. It reads in train.workers threads.

    The exit status is 0 if all can be used, 1 if training would stop at some file, 2 if CONFIG is wrong. Warnings do
    not change it.

    \b
    pspnet-fast check-data configs/cityscapes.yaml data.root=/data/cityscapes
    pspnet-fast check-data configs/folders.yaml data.root=photos --out report
    pspnet-fast check-data configs/ade20k.yaml data.root=/data/ade --sample 500 --json
    """
    from tqdm import tqdm

    from pspnet_fast.data.survey import Summary, survey
    from pspnet_fast.data.transforms import EvalTransform
    from pspnet_fast.training.config_file import load_config

    settings = load_config(config, overrides)
    _check_free(out, overwrite)
    names, colors = read_classes(settings.data)
    datasets, summaries = [], {}
    for part in ("train", "val"):
        failed: list[Exception] = []
        dataset = pair_dataset(settings.data, part, len(names), EvalTransform(), failed=failed)
        dataset.pairs = _spread(dataset.pairs, sample)
        bar = tqdm(
            survey(dataset, len(names), settings.train.workers),
            total=len(dataset),
            desc=part,
            unit="img",
            disable=None,
        )
        summaries[part] = Summary(list(bar), [str(error) for error in failed])
        datasets.append(dataset)
    errors = {part: summary.errors for part, summary in summaries.items()}
    warnings = _warnings(settings.data, datasets, summaries, names, errors)
    if out:
        _write(out, datasets, summaries, names, colors)
    report = _report(summaries, names)
    report.update(warnings=warnings, errors=errors)
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(_text(report, summaries, names)))
    if count := sum(map(len, errors.values())):
        problems = "1 problem" if count == 1 else f"{count} problems"
        where = f"{out / FILES[0]} names" if out else "--out FOLDER and --json name"
        raise click.ClickException(f"{problems} at which training would stop; {where} all files")


def _check_free(out: Path | None, overwrite: bool) -> None:
    existing = [out / name for name in FILES if (out / name).exists()] if out else []
    if existing and not overwrite:
        raise click.UsageError(f"{existing[0]} exists: replace with --overwrite, or choose another --out")


def _spread(pairs: list[Any], count: int | None) -> list[Any]:
    step = max(len(pairs) / count, 1) if count else 1
    return [pairs[int(place * step)] for place in range(int(len(pairs) / step))]


def _warnings(
    data: "DataConfig",
    datasets: Sequence["PairDataset"],
    summaries: dict[str, "Summary"],
    names: Sequence[str],
    errors: dict[str, list[str]],
) -> list[str]:
    """What may be wrong; what is wrong with all files together is added to ``errors``."""
    from pspnet_fast.data import DataError
    from pspnet_fast.data.checks import check_lists, check_normalisation, unlabelled

    warnings = check_normalisation(data.mean, data.std)
    good = [not wrong for wrong in errors.values()]
    readable = [dataset for dataset, fine in zip(datasets, good, strict=True) if dataset.pairs and fine]
    try:
        warnings += check_lists(*readable) if readable else []
    except DataError as error:
        errors["train"].append(str(error))
    for dataset, (part, summary) in zip(datasets, summaries.items(), strict=True):
        if dataset.unused:
            warnings.append(f"{part}: {len(dataset.unused)} labels have no image, the first is {dataset.unused[0]}")
        if not summary.files:
            errors[part].append(f"{part}: no pair of an image and a label")
            continue
        if summary.pixels[:-1].any() and (text := unlabelled(summary.pixels[:-1], names)):
            warnings.append(f"{part}: {text}")
        if empty := [file.label for file in summary.files if file.size and not file.pixels[:-1].any()]:
            warnings.append(f"{part}: {len(empty)} labels have no pixel of a class, the first is {empty[0]}")
    return warnings


def _report(summaries: dict[str, "Summary"], names: Sequence[str]) -> dict[str, Any]:
    from pspnet_fast.data.survey import class_weights, suggested_crop

    report: dict[str, Any] = {}
    for part, summary in summaries.items():
        sizes = summary.sizes
        report[part] = {
            "images": len(summary.files),
            "sizes": [[*size, count] for size, count in sizes.most_common()],
            "pixels": dict(zip(names, summary.pixels[:-1].tolist(), strict=True)) if summary.files else {},
            "images_with": dict(zip(names, summary.images_with.tolist(), strict=True)) if summary.files else {},
            "ignored": int(summary.pixels[-1]) if summary.files else 0,
            "unknown": dict(summary.unknown.most_common()),
            "missing": len(summary.alone),
            "unreadable": sum(file.error is not None for file in summary.files),
        }
    files = summaries["train"].files
    report["class_weights"] = [float(f"{weight:.4g}") for weight in class_weights(files)] if files else None
    report["crop"] = suggested_crop(summaries["train"].sizes)
    return report


def _text(report: dict[str, Any], summaries: dict[str, "Summary"], names: Sequence[str]) -> Iterator[str]:
    """The table and the sentences below it."""
    width = max(len("class"), *map(len, names))
    parts = "".join(f" {part + ' pixels':>13} {'images':>7}" for part in summaries)
    yield f"{'':>3} {'class':<{width}}{parts}  weight"
    weights = report["class_weights"] or [1.0] * len(names)
    for index, name in enumerate(names):
        line = f"{index:>3} {name:<{width}}"
        for part in summaries:
            pixels, total = report[part]["pixels"].get(name, 0), sum(report[part]["pixels"].values())
            line += f" {_percent(pixels, total):>13} {report[part]['images_with'].get(name, 0):>7}"
        yield f"{line} {weights[index]:>7.4g}"
    for part in summaries:
        own = report[part]
        every = sum(own["pixels"].values()) + own["ignored"] + sum(own["unknown"].values())
        yield (
            f"{part}: {own['images']} images; {_sizes(own['sizes'])}; {_percent(own['ignored'], every)} of the pixels "
            f"ignored, {_percent(sum(own['unknown'].values()), every)} of no class; {own['missing']} files without "
            f"their counterpart, {own['unreadable']} pairs unusable"
        )
        if own["unknown"]:
            first = list(own["unknown"].items())[:SHOWN]
            yield f"{part}: no class: " + ", ".join(f"{value} ({count} pixels)" for value, count in first)
    if report["class_weights"]:
        yield "suggestion: train.class_weights=[" + ",".join(f"{weight:.4g}" for weight in weights) + "]"
    if report["crop"]:
        yield "suggestion: data.crop=[{},{}]".format(*report["crop"])
    yield from (f"Warning: {warning}" for warning in report["warnings"])
    for part, errors in report["errors"].items():
        yield from (f"Problem ({part}): {error}" for error in errors[:SHOWN])
        if len(errors) > SHOWN:
            yield f"Problem ({part}): and {len(errors) - SHOWN} more"


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total:.3f} %" if total else "-"


def _sizes(sizes: Sequence[Sequence[int]]) -> str:
    if not sizes:
        return "no size"
    if len(sizes) == 1:
        return f"all {sizes[0][1]}x{sizes[0][0]}"
    heights, widths = [size[0] for size in sizes], [size[1] for size in sizes]
    return (
        f"{len(sizes)} sizes, {min(widths)} to {max(widths)} wide and {min(heights)} to {max(heights)} high, "
        f"most often {sizes[0][1]}x{sizes[0][0]}"
    )


def _write(
    out: Path,
    datasets: Sequence["PairDataset"],
    summaries: dict[str, "Summary"],
    names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
) -> None:
    from pspnet_fast.data.survey import to_csv
    from pspnet_fast.files import replacing
    from pspnet_fast.inference.render import save_png
    from pspnet_fast.inference.survey_pictures import draw_histogram, draw_samples

    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "files.csv") as file:
        file.write(to_csv(summaries, names).encode())
    seen = {part: summary for part, summary in summaries.items() if summary.files}
    if seen:
        draw_histogram(seen, names, colors, out / "classes.png")
    train, *_ = summaries.values()
    good = [index for index, report in enumerate(train.files) if report.size and not report.unknown]
    if chosen := _spread(good, SAMPLES):
        save_png(out / "samples.png", draw_samples([datasets[0].read(index) for index in chosen], names, colors))
