"""Which blocks are computed again: all, every N-th, or as few as the memory allows."""

from __future__ import annotations

from distrain.errors import ConfigError
from distrain.files.escaping import Lines
from distrain.strategies.recomputation.model_blocks import Passage, peak_of, sizes_held

KEY = "model.checkpoint_activations"
MIB = 2**20


def names_of(passages: list[Passage]) -> list[str]:
    """The blocks that hold less memory if they are computed again, in the model's order."""
    saves: dict[str, bool] = {}
    for passage in passages:
        if passage.name:
            # A block that is called twice.
            saves[passage.name] = saves.get(passage.name, True) and passage.saves
    return [name for name, does in saves.items() if does]


def every_nth(passages: list[Passage], interval: int) -> list[str]:
    """Every ``interval``-th of the blocks that hold less memory then, as torchtitan counts them: not the first ones.

    Raises:
        ConfigError: There are fewer.
    """
    names = names_of(passages)
    chosen = names[interval - 1 :: interval]
    if not chosen:
        problem = f"only {len(names)} of the model's blocks keep more than what they get and return"
        raise ConfigError(KEY, interval if interval > 1 else "all", problem, ["none", *range(1, len(names) + 1)])
    return chosen


def fewest(passages: list[Passage], budget: float) -> frozenset[str]:
    """Blocks to compute again, in the least time, so that passes hold no more than a budget where that is possible.

    Blocks are added one by one, the one first that frees most bytes at the peak for its time; then those are left out
    that the others have made unnecessary.

    Args:
        passages: The calls, with their costs.
        budget: Bytes.
    """
    seconds: dict[str, float] = {}
    for passage in passages:
        seconds[passage.name] = seconds.get(passage.name, 0.0) + passage.seconds
    chosen: frozenset[str] = frozenset()
    left = set(names_of(passages))
    peak = peak_of(passages, chosen)
    while peak > budget and left:
        peaks = {name: peak_of(passages, chosen | {name}) for name in left}
        # Two calls may need most, so that no block alone frees anything at the peak: then by what it frees at the end.
        total = sizes_held(passages, chosen)[-1]
        gains = {name: (peak - peaks[name], total - sizes_held(passages, chosen | {name})[-1]) for name in left}
        best = max(left, key=lambda name: (*(gain / max(seconds[name], 1e-9) for gain in gains[name]), name))
        chosen, peak = chosen | {best}, peaks[best]
        left.remove(best)
    for name in sorted(chosen, key=lambda name: -seconds[name]):
        without = peak_of(passages, chosen - {name})
        if without <= max(budget, peak):
            chosen = chosen - {name}
    return chosen


def described(passages: list[Passage], chosen: frozenset[str], held: float) -> Lines:
    """For people: what is held with and without the choice, and how much longer a forward and a backward pass takes.

    Args:
        passages: The calls, with their costs.
        chosen: The blocks that are computed again.
        held: Bytes of what is held besides activations.
    """
    again = sum(passage.seconds for passage in passages if passage.name in chosen)
    forward = sum(passage.seconds for passage in passages)
    without, with_ = (held + peak_of(passages, names) for names in (frozenset[str](), chosen))
    share = again / (3 * forward) if forward else 0.0
    return Lines.of(
        [
            f"{len(chosen)} of {len(names_of(passages))} blocks are computed again: {with_ / MIB:,.0f} MiB instead of "
            f"{without / MIB:,.0f}, passes about {share:.0%} longer",
            ", ".join(name for name in names_of(passages) if name in chosen) or "none",
        ]
    )
