"""``pspnet-fast info``."""

import json

import click


@click.command(short_help="Show versions, compiled kernels and this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Show versions, the kernels that were compiled, and what this machine has.

    \b
    pspnet-fast info
    pspnet-fast info --json
    """
    from pspnet_fast import info as report

    facts = report.collect()
    click.echo(json.dumps(facts, indent=2) if as_json else report.format(facts))
