"""``pspnet-fast eval-compare``."""

from pathlib import Path

import click

from pspnet_fast.cli.common import ANY


@click.command("eval-compare", short_help="Compare two evaluations: which classes and images moved.")
@click.argument("first", type=ANY)
@click.argument("second", type=ANY)
@click.option("--images", type=click.IntRange(min=0), default=10, show_default=True, help="How many to name, at most.")
def eval_compare(first: Path, second: Path, images: int) -> None:
    """Tell which classes and images changed from the evaluation FIRST to SECOND, the greatest change first.

    Each is a scores.json that `pspnet-fast eval --out` left, or its folder. Where protocols or images
    differ it says so.

    \b
    pspnet-fast eval-compare runs/before runs/after
    pspnet-fast eval-compare whole/scores.json windows/scores.json --images 20
    """
    from pspnet_fast.training.score_files import comparison, read_scores

    click.echo(comparison(read_scores(first), read_scores(second), images))
