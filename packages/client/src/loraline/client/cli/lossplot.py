"""The loss curve: drawn with braille dots on a terminal, a few figures in a pipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.cli.output import Output

WIDTH, HEIGHT = 56, 10
"""Size of the drawing in characters; each holds two by four dots."""
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def tell_loss(output: Output, curve: Sequence[trainer_pb2.LossPoint]) -> None:
    """Write the loss by step, in nats per token."""
    points = [(point.step, point.loss) for point in curve if point.loss > 0 and math.isfinite(point.loss)]
    if not points:
        return
    output.say("")
    output.say("training loss by step, in nats per token", "bold cyan")
    if output.terminal:
        for line in draw(smoothed(points)):
            output.say(line)
    else:
        for step, loss in thinned(points, 10):
            output.say(f"  step {step:>5}  loss {loss:.3f}")
    evaluated = [(point.step, point.eval_loss) for point in curve if point.HasField("eval_loss")]
    if evaluated:
        text = ", ".join(f"{loss:.3f} at step {step}" for step, loss in thinned(evaluated, 6))
        output.say(f"  validation loss: {text}")


def thinned(points: Sequence[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """Return at most `count` points, evenly chosen, the first and the last among them."""
    if len(points) <= count:
        return list(points)
    return [points[round(index * (len(points) - 1) / (count - 1))] for index in range(count)]


def smoothed(points: Sequence[tuple[int, float]], bins: int = WIDTH) -> list[tuple[int, float]]:
    """Return the mean loss of each stretch of steps: single batches jump too much to be read."""
    if len(points) <= bins:
        return list(points)
    edges = [round(index * len(points) / bins) for index in range(bins + 1)]
    stretches = [points[begin:end] for begin, end in pairwise(edges)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in stretches]


def draw(points: Sequence[tuple[int, float]], width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Return the lines of a drawing with axes; points are joined."""
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    low, high = min(0.0, *losses), max(losses) or 1.0
    across, down = width * 2 - 1, height * 4 - 1
    span = max(steps[-1] - steps[0], 1)

    def place(step: int, loss: float) -> tuple[int, int]:
        return round((step - steps[0]) / span * across), round((high - loss) / (high - low) * down)

    cells = [[0] * width for _ in range(height)]
    places = [place(*point) for point in points]
    for (x1, y1), (x2, y2) in zip(places, [*places[1:], places[-1]], strict=True):
        length = max(abs(x2 - x1), abs(y2 - y1), 1)
        for part in range(length + 1):
            x, y = round(x1 + (x2 - x1) * part / length), round(y1 + (y2 - y1) * part / length)
            cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    labels = {0: f"{high:.2f}", height // 2: f"{(high + low) / 2:.2f}", height - 1: f"{low:.2f}"}
    lines = [
        f"{labels.get(row, ''):>7} ┤{''.join(chr(0x2800 + dots) for dots in line)}" for row, line in enumerate(cells)
    ]
    first, last = str(steps[0]), str(steps[-1])
    lines.append(" " * 8 + "└" + "─" * width)
    lines.append(" " * 9 + first + " " * max(width - len(first) - len(last), 1) + last)
    return lines
