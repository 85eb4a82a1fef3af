"""Checkpoints of other packages, as models of this one. See docs/convert.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pspnet_fast.convert.conversion import Conversion as Conversion
    from pspnet_fast.convert.conversion import convert as convert
    from pspnet_fast.convert.report import Report as Report
    from pspnet_fast.convert.sources import SOURCES as SOURCES

_PLACES = {"convert": "conversion", "Conversion": "conversion", "Report": "report", "SOURCES": "sources"}


def __getattr__(name: str) -> Any:
    """On demand: the models, which conversion builds, read their weights by the tables here."""
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(f"pspnet_fast.convert.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
