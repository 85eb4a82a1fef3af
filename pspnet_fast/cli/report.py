"""``pspnet-fast report``."""

import os
from pathlib import Path

import click

from pspnet_fast.cli.common import ANY, NEW_FILE


@click.command(short_help="Write one HTML page of one or several runs: curves, scores, pictures.")
@click.argument("runs", nargs=-1, required=True, type=ANY, metavar="RUN...")
@click.option(
    "--out", type=NEW_FILE, help="The page; by default report.html in RUN, or in what several have in common."
)
@click.option("--overwrite", is_flag=True, help="Replace a page that exists.")
def report(runs: tuple[Path, ...], out: Path | None, overwrite: bool) -> None:
    """Write a page of the folders RUN, as `pspnet-fast train` and `eval` leave them, to open in a browser.

    It shows the curves of training and validation, the speed and where the time goes, IoU by class, and configuration
    and protocol. Where eval has written RUN/eval/scores.json, it also shows the confusion matrix, the calibration, and
    the best, the median and the worst predictions. Several runs share curves and tables. The page is one file that
    needs no network; it can be passed on as it is.

    \b
    pspnet-fast report runs/camvid
    pspnet-fast report runs/camvid runs/camvid_ohem --out comparison.html
    """
    from pspnet_fast.report.page import write_page

    page = out or Path(os.path.commonpath([run.resolve() for run in runs]), "report.html")
    if page.exists() and not overwrite:
        raise click.UsageError(f"{page} exists: replace with --overwrite, or choose another --out")
    write_page(runs, page)
    click.echo(f"wrote {page}")
