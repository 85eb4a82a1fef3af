"""``python -m pspnet_fast``: the command line."""

from .cli import main

main(prog_name="python -m pspnet_fast")
