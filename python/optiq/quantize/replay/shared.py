"""Sequences that ranks share: each runs some of them, and works on some of the modules.

What a module is called with, and the gradients there, go from the ranks that ran the sequences to
the one that works on the module. That one has them in the order of the sequences, as a single rank
would, so that what it makes of them is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...distributed.ranks import World
from ...models.roles import Module
from ...nn.replay import Replay, Tape
from .backward import Backward, Called
from .gradients import Call
from .streamed import Drop, keep

Calls = list[list[Call]]  # by sequence


@dataclass(frozen=True)
class Shared:
    """The runs of this rank: `own` are the numbers of its sequences, in order."""

    world: World
    lengths: Sequence[int]  # of all sequences
    own: Sequence[int]
    tapes: list[Tape]

    @classmethod
    def record(
        cls, world: World, replay: Replay, sequences: Sequence[Sequence[int]], after: Drop = keep
    ) -> Shared:
        """Run this rank's share of `sequences`; `after` is that of `Replay.record_together`."""
        lengths = [len(tokens) for tokens in sequences]
        own = world.share(lengths)
        tapes = replay.record_together([sequences[i] for i in own], after=after)
        return cls(world, lengths, own, tapes)

    @property
    def count(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def calls(
        self,
        backward: Backward,
        modules: Sequence[Module],
        cost: Callable[[Module], float],
        everywhere: Callable[[Module], bool] = lambda _: False,
    ) -> Iterator[tuple[Module, Calls | None]]:
        """The modules of `Backward.groups` with their calls in all sequences, where this rank works
        on them.

        As many blocks as there are ranks are divided together, by `cost`, because one module may
        take most of a block's work. All ranks get the calls of what is worked on `everywhere`; of
        blocks with such modules there is one at a time.
        """
        world = self.world
        inside = any(everywhere(m) for m in modules if m.block is not None)
        for group in backward.groups(modules, 1 if inside else world.size):
            found: list[tuple[Module, Calls | None]] = list(group)
            if world.size > 1:
                owners = world.divide([0.0 if everywhere(m) else cost(m) for m, _ in group])
                for n, owner in enumerate(owners):
                    called, group[n] = group[n], (group[n][0], [])
                    found[n] = called[0], self._handed(called, owner, everywhere(called[0]))
            group.clear()
            while found:
                yield found.pop(0)

    def _handed(self, called: Called, owner: int, everywhere: bool) -> Calls | None:
        numbered = list(zip(self.own, called[1], strict=True))
        world = self.world
        parts = world.gather(numbered) if everywhere else world.bring(numbered, owner)
        if parts is None:
            return None
        found = {n: calls for part in parts for n, calls in part}
        return [found[n] for n in sorted(found)]
