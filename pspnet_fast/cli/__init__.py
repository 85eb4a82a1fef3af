"""Command line: ``pspnet-fast COMMAND``; the commands stand at the end."""

import click

from pspnet_fast import __version__
from pspnet_fast.cli.bench import bench
from pspnet_fast.cli.check_data import check_data
from pspnet_fast.cli.coco_labels import coco_labels
from pspnet_fast.cli.convert import convert
from pspnet_fast.cli.eval import evaluate
from pspnet_fast.cli.eval_compare import eval_compare
from pspnet_fast.cli.export import export
from pspnet_fast.cli.group import EXTRAS, Group
from pspnet_fast.cli.info import info
from pspnet_fast.cli.predict import predict
from pspnet_fast.cli.report import report
from pspnet_fast.cli.train import train

__all__ = ["EXTRAS", "main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="pspnet_fast %(version)s")
@click.option("--traceback", is_flag=True, help="Show where in the code an error arose.")
def main(traceback: bool) -> None:
    """Train a PSPNet, measure it, and label images with it.

    \b
    pspnet-fast check-data configs/camvid.yaml data.root=/data/camvid
    pspnet-fast train configs/camvid.yaml data.root=/data/camvid
    pspnet-fast eval configs/camvid.yaml data.root=/data/camvid --checkpoint runs/camvid/best.pt
    pspnet-fast predict street.jpg --checkpoint runs/camvid/best.pt --out labels
    pspnet-fast export --checkpoint runs/camvid/best.pt --out camvid.onnx
    pspnet-fast report runs/camvid
    """


for command in (
    *(train, evaluate, eval_compare, predict, report),
    *(convert, export),
    *(check_data, coco_labels, bench, info),
):
    main.add_command(command)
