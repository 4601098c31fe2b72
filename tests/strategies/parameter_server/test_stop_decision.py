"""All workers act on a decision after the same step."""

from __future__ import annotations

import random

from distrain.strategies.parameter_server.stop_decision import StopDecision


def test_a_decision_is_for_a_step_that_no_worker_has_passed() -> None:
    draw = random.Random(0)
    for _ in range(300):
        in_flight, workers = draw.choice([0, 1]), draw.choice([1, 2, 4])
        decision = StopDecision(in_flight)
        pushes = [0] * workers
        answers: list[list[tuple[int, int]]] = [[] for _ in range(workers)]
        acted: list[list[tuple[int, int]]] = [[] for _ in range(workers)]
        for _ in range(60):
            rank = draw.randrange(workers)
            # After acting on a decision a worker waits for the others, as trainers do when they save.
            if acted[rank] and acted[rank][-1][0] == pushes[rank] and min(pushes) < pushes[rank]:
                continue
            pushes[rank] += 1
            decision.add_request(draw.choice([0, 0, 0, 1, 8]), pushes[rank], pushes)
            answers[rank].append((decision.step, decision.requests))
            # A worker has the answer to a push when the steps in flight are over.
            answered = len(answers[rank]) - 1 - in_flight
            if answered >= 0 and answers[rank][answered][0] == pushes[rank]:
                acted[rank].append(answers[rank][answered])
        done = min(pushes)
        assert len({tuple(action for action in actions if action[0] <= done) for actions in acted}) == 1
