"""What a conversion did, and what it took for granted."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """Of :func:`pspnet_fast.convert.convert`.

    Attributes:
        source: title of the package whose names the file has.
        model: what it is, in words.
        loaded: the model's entries that the file filled.
        remapped: of these, the file's name -> the model's, where they differ.
        changed: what was done to values, in sentences; the outputs stay the same.
        dropped: the file's entries of no use to the model -> why.
        reinitialised: the model's entries that were left random because the number of classes was changed.
        missing: the model's other entries that the file lacks, which are random.
        mismatched: entries of another shape than the model's, in words; they were not loaded.
        unknown: the file's entries that the model has no place for.
        known: conventions that the file tells.
        assumed: conventions that it does not tell.
        warnings: what must not be overlooked.
        self_test: how the comparison with the package itself went, or why there was none.
    """

    source: str
    model: str = ""
    loaded: list[str] = field(default_factory=list)
    remapped: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    reinitialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    self_test: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.model}",
            f"{len(self.loaded)} entries loaded, {len(self.remapped)} of them under other names; "
            f"{len(self.dropped)} dropped, {len(self.missing)} missing, {len(self.mismatched)} of another shape, "
            f"{len(self.unknown)} unknown",
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"dropped: {shortened(names)}: {reason}" for reason, names in reasons.items()]
        for title, entries in (
            ("missing, random now", self.missing),
            ("another shape, random now", self.mismatched),
            ("unknown, not used", self.unknown),
            ("random, as the number of classes was changed", self.reinitialised),
        ):
            if entries:
                lines.append(f"{title}: {shortened(entries)}")
        for title, sentences in (("changed", self.changed), ("known", self.known), ("assumed", self.assumed)):
            lines += [f"{title}: {sentence}" for sentence in sentences]
        if self.self_test:
            lines.append(f"self-test: {self.self_test}")
        return "\n".join([*lines, *(f"WARNING: {sentence}" for sentence in self.warnings)])


def shortened(names: list[str], most: int = 4) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
