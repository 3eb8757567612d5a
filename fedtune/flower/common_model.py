"""What the clients of a run must have in common: the base that is pinned, one set of layers, one list of classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from fedtune.data.partition import sorted_values
from fedtune.wire.profile import ModelSpec, difference, label_list


class CommonModel:
    """Which base, layers and classes a run has.

    The base is the one that the recipe pins, or that of the first client that says hello, which is pinned from then on;
    how many others have another one decides nothing. Classes are those that the recipe names, or else the union over
    the clients of the first round, in the order of a simulation; then every client uses that list, also one that lacks
    a class.
    """

    def __init__(
        self, *, base: str = "", labels: Sequence[str] = (), on_base: Callable[[str], None] = lambda digest: None
    ) -> None:
        """Begin with what the recipe says.

        Args:
            base: digest (hex) of the base; empty: that of the first client.
            labels: class names, by class; none: the union.
            on_base: called with the digest when the first client has pinned it.
        """
        self._pinned, self._on_base = base, on_base
        self.labels: Sequence[str] = tuple(labels)
        """Classes that clients are asked to use; none as long as each uses its own."""
        self._first: ModelSpec | None = None
        self.settled: ModelSpec | None = None
        """What the clients have in common, once the first round can begin."""

    def find_fault(self, found: ModelSpec, *, asked: bool) -> str:
        """Return why a client cannot take part; empty if it can.

        Args:
            found: what it has.
            asked: whether its hello named the classes to use; then it may have more, where its base has a head of them.
        """
        if self._pinned and found.base != self._pinned:
            return difference(replace(found, base=self._pinned), found)
        if not asked and self.labels and (odd := sorted(set(found.labels) - set(self.labels))):
            return (
                f"expected the classes {label_list(self.labels)}; got {odd[0]!r} too; "
                "name all classes of the federation in data.labels of the recipe"
            )
        if self.settled is not None and self.is_current(found):
            return difference(self.settled, found)
        return difference(without_classes(self._first), without_classes(found)) if self._first is not None else ""

    def take(self, found: ModelSpec) -> None:
        """Take what a client has for what the run has, if it is the first one."""
        if self._first is None:
            self._first = found
            if not self._pinned:
                self._pinned = found.base
                self._on_base(found.base)

    def is_current(self, found: ModelSpec) -> bool:
        """Return whether a client uses the classes that it should; a base with a head of its own may have more."""
        return set(self.labels) <= set(found.labels)

    def unite_labels(self, specs: Collection[ModelSpec]) -> None:
        """Settle the classes: those of all clients, where these differ."""
        lists = {tuple(spec.labels) for spec in specs}
        if not self.labels and len(lists) > 1:
            self.labels = tuple(sorted_values(label for labels in lists for label in labels))

    def settle(self, spec: ModelSpec) -> None:
        """Settle what the clients have in common, by one that uses the right classes."""
        # From now on every client is asked for these: one that comes later may lack a class.
        self.settled, self.labels = spec, tuple(spec.labels)


def without_classes(spec: ModelSpec) -> ModelSpec:
    """Return what does not depend on the class names: a classifier's head has a row for each of them."""
    if not spec.labels:
        return spec
    return replace(spec, labels=(), saved={}, parameters=0, manifest=b"", anatomy=None)
