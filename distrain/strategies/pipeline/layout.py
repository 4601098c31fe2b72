"""A recorded forward pass laid out in a line: where it can be cut, what would cross, and the calls of each part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from distrain.strategies.pipeline.calls import Call, State, Trace, Value, ValueInfo, leaves_of, states_in, values_in
from distrain.strategies.pipeline.program import Program, Step

#: What identifies a call in both modes: who makes it, of what, and how often that was done before.
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Span:
    """An opened module's call.

    Attributes:
        call: The call.
        start: Index of the first call in it.
        stop: Index behind the last one.
    """

    call: Call
    start: int
    stop: int


class Line:
    """The calls of one mode in their order, without those that were only made to make others.

    Args:
        model: The model.
        trace: Its recorded forward pass.

    Attributes:
        calls: The calls.
        spans: The calls of opened modules, but the model's own, from the outside in.
        keys: What identifies each call.
        work: For each call a number that grows with its floating-point operations; 0 without a weight matrix.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._model, self.trace = model, trace
        self._parameters = dict(model.named_parameters())
        self.calls: list[Call] = []
        self.spans: list[Span] = []
        self._span_of: dict[int, Span] = {}
        for call in trace.root.calls or []:
            self._lay_out(call)
        self._index = {id(call): index for index, call in enumerate(self.calls)}
        self.spans.sort(key=lambda span: (span.start, -span.stop))
        self._index_names()
        counts: Counter[tuple[str, str]] = Counter()
        self.keys: list[Key] = []
        for call in self.calls:
            kind = (call.within, call.label)
            self.keys.append((*kind, counts[kind]))
            counts[kind] += 1
        self._index_values()
        self._index_state()
        self.work = [self._work_of(call) for call in self.calls]

    def __len__(self) -> int:
        return len(self.calls)

    def _lay_out(self, call: Call) -> None:
        if call.calls is None:
            self.calls.append(call)
            return
        start = len(self.calls)
        for inner in call.calls:
            self._lay_out(inner)
        span = self._span_of[id(call)] = Span(call, start, len(self.calls))
        self.spans.append(span)

    def _index_names(self) -> None:
        """Names each call after the outermost module that begins there: ``layer``, and the second time ``layer#2``."""
        begins = [(span.start, str(span.call.target)) for span in self.spans if span.start < span.stop]
        begins += [(index, call.label) for index, call in enumerate(self.calls)]
        counts: Counter[str] = Counter()
        self._names: dict[int, str] = {}
        self._positions: dict[str, int] = {}
        for position, name in sorted(begins, key=lambda begin: begin[0]):
            counts[name] += 1
            numbered = name if counts[name] == 1 else f"{name}#{counts[name]}"
            self._names.setdefault(position, numbered)
            self._positions[numbered] = position

    def _index_values(self) -> None:
        infos, calls = self.trace.values, self.calls
        self.uses = [values_in(call.arguments) for call in calls]
        # What is the same in each forward pass with as many samples is made again where it is needed.
        self.is_repeatable = [
            not isinstance(call.target, str)
            and not any(infos[n].needs_input for n in (*uses, *(n for n in call.results if n is not None)))
            and bool(call.results or call.writes)
            for call, uses in zip(calls, self.uses, strict=True)
        ]
        self.defined: dict[int, int] = {0: -1}
        self.last_use: dict[int, int] = {}
        for index, (call, uses) in enumerate(zip(calls, self.uses, strict=True)):
            for number in uses:
                self.last_use[number] = index
            for result in call.results:
                if result is not None:
                    self.defined.setdefault(result, index)
        for number in values_in(self.trace.output):
            self.last_use[number] = len(calls)

    def _index_state(self) -> None:
        """Notes which call uses which parameters and buffers, by their ids."""
        saved = self._model.state_dict()
        buffers = dict(self._model.named_buffers())
        #: Buffers that are in no checkpoint: nothing recorded changes them, so each part may have them.
        self.constants = {name for name in buffers if name not in saved}
        names = {**self._parameters, **buffers}
        self.states: list[set[int]] = []
        for call in self.calls:
            own = {id(names[name]) for name in states_in(call.arguments) if name not in self.constants}
            if isinstance(call.target, str):
                module = self._model.get_submodule(call.target)
                own |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
            self.states.append(own)
        self._state_spans: dict[int, tuple[int, int]] = {}
        for index, own in enumerate(self.states):
            for tensor in own:
                first, _ = self._state_spans.get(tensor, (index, index))
                self._state_spans[tensor] = (first, index)

    def _work_of(self, call: Call) -> float:
        tensors = [leaf for leaf in leaves_of(call.arguments) if isinstance(leaf, State)]
        weights = [self._parameters[leaf.name] for leaf in tensors if leaf.name in self._parameters]
        if isinstance(call.target, str):
            weights += list(self._model.get_submodule(call.target).parameters())
        sizes = [weight.numel() for weight in weights if sum(size > 1 for size in weight.shape) >= 2]
        shapes = [self.trace.values[number].shape[1:] for number in call.results if number is not None]
        # An image's channels come first, those of tokens last.
        places = [math.prod(shape) // max(1, shape[0] if len(shape) == 3 else shape[-1]) for shape in shapes if shape]
        return float(sum(sizes) * max(places, default=1))

    # --- cuts --------------------------------------------------------------------------------------------------------

    def crossing(self, position: int) -> list[int]:
        """Numbers of the values that a part from ``position`` on needs of what comes before."""
        return sorted(
            number
            for number, last in self.last_use.items()
            if self.defined[number] < position <= last and not self._is_made_again(number)
        )

    def _is_made_again(self, number: int) -> bool:
        return bool(number) and not self.trace.values[number].needs_input

    def infos(self, position: int) -> list[ValueInfo]:
        """What is known of the values that cross at ``position``."""
        return [self.trace.values[number] for number in self.crossing(position)]

    def bytes_across(self, position: int) -> int:
        """Bytes of one sample that cross at ``position``."""
        return sum(math.prod(info.shape[1:]) * info.dtype.itemsize for info in self.infos(position))

    def problem_at(self, position: int) -> str:
        """Why the line can't be cut at ``position``; empty if it can."""
        numbers = self.crossing(position)
        if not numbers:
            return "no tensor that was computed before is used from there on"
        for number in numbers:
            if not self.trace.values[number].shape:
                made = self.calls[self.defined[number]]
                at = made.place and f" at {made.place}"
                return f"a result of {made.label}{at} would cross, whose first dimension is not the sample"
        shared = Counter(self.trace.values[number].memory for number in numbers)
        several = {memory for memory, count in shared.items() if count > 1}
        for call in self.calls[position:]:
            if several & call.writes:
                return f"{call.label} at {call.place} writes into one of two tensors in the same memory, and both cross"
        for first, last in self._state_spans.values():
            if first < position <= last:
                earlier, later = self.calls[first], self.calls[last]
                return f"{earlier.label} and {later.label} use the same parameter or buffer"
        return ""

    def depth(self, position: int) -> int:
        """In how many opened modules ``position`` lies."""
        return sum(span.start < position < span.stop for span in self.spans)

    def name_at(self, position: int) -> str:
        """The name of what begins at ``position``."""
        return self._names[position]

    def position_of(self, name: str) -> int | None:
        """Where what has this name begins; ``None`` if nothing has it."""
        return self._positions.get(name)

    # --- parts -------------------------------------------------------------------------------------------------------

    def used_between(self, start: int, stop: int) -> set[int]:
        """Ids of the parameters and buffers that the calls from ``start`` to before ``stop`` use."""
        return {tensor for own in self.states[start:stop] for tensor in own}

    def part(
        self, start: int, stop: int, elsewhere: Collection[int], *, training: bool
    ) -> tuple[Program, set[str], set[str]]:
        """The calls from ``start`` to before ``stop``.

        A module that was opened is called as a whole if all of its calls are among them.

        Args:
            start: Index of the first call.
            stop: Index behind the last one.
            elsewhere: Ids of the parameters and buffers that belong to other parts.
            training: Whether these are the calls of training mode.

        Returns:
            The calls, the names of the modules that they call, and those of the parameters and buffers that they read.
        """
        inputs = tuple(self.crossing(start)) if start else (0,)
        output = self.trace.output
        if stop < len(self):
            output = tuple(Value(number) for number in self.crossing(stop))
        made_again = {n for n in range(len(self.trace.values)) if self._is_made_again(n)}
        known = {*inputs, *made_again}
        chosen: list[Call] = []
        for call in self._outermost(self.trace.root.calls or [], start, stop, elsewhere, known):
            chosen.append(call)
            known.update(number for number in call.results if number is not None)
        chosen = [*self._made_again_for(chosen, output, start), *chosen]
        steps = self._steps(chosen, values_in(output), training=training)
        modules = {call.target for call in chosen if isinstance(call.target, str)}
        states = {name for call in chosen for name in states_in(call.arguments)} - self.constants
        return Program(inputs, steps, output), modules, states

    def _outermost(
        self, calls: Sequence[Call], start: int, stop: int, elsewhere: Collection[int], known: set[int]
    ) -> Iterator[Call]:
        for call in calls:
            if call.calls is None:
                index = self._index[id(call)]
                if start <= index < stop:
                    yield call
                continue
            span = self._span_of[id(call)]
            if span.stop <= start or stop <= span.start:
                continue
            if start <= span.start and span.stop <= stop and self._is_whole(span, elsewhere, known):
                yield call
            else:
                yield from self._outermost(call.calls, start, stop, elsewhere, known)

    def _is_whole(self, span: Span, elsewhere: Collection[int], known: set[int]) -> bool:
        """Whether calling an opened module gives all that its recorded calls give, and needs nothing more."""
        call = span.call
        if call.arguments is None or None in call.results or not values_in(call.arguments) <= known:
            return False
        module = self._model.get_submodule(str(call.target))
        if any(id(tensor) in elsewhere for tensor in (*module.parameters(), *module.buffers())):
            return False
        made = {n for inner in self.calls[span.start : span.stop] for n in inner.results if n is not None}
        escaping = {n for n in made if self.defined[n] >= span.start and self.last_use.get(n, -1) >= span.stop}
        return escaping <= set(call.results)

    def _made_again_for(self, chosen: Sequence[Call], output: object, start: int) -> list[Call]:
        """The earlier calls that the chosen ones need and whose results don't cross."""
        needed = set(values_in(output))
        for call in chosen:
            needed |= values_in(call.arguments)
        found: list[Call] = []
        for index in reversed(range(start)):
            call = self.calls[index]
            numbers = {n for n in call.results if n is not None} or self.uses[index]
            if self.is_repeatable[index] and needed & numbers:
                found.append(call)
                needed |= self.uses[index]
        return found[::-1]

    def _steps(self, calls: Sequence[Call], kept: set[int], *, training: bool) -> tuple[Step, ...]:
        last = {number: index for index, call in enumerate(calls) for number in values_in(call.arguments)}
        for index, call in enumerate(calls):
            for number in call.results:
                if number is not None:
                    last.setdefault(number, index)
        steps = []
        for index, call in enumerate(calls):
            ended = tuple(sorted(n for n, at in last.items() if at == index and n not in kept))
            without_gradient = training and not call.records_gradient
            steps.append(Step(call.target, call.arguments, tuple(call.results), without_gradient, ended))
        return tuple(steps)
