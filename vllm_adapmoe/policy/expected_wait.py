"""Arithmetic of eviction values, on whole numbers: the one text of the CPU worker, the replay and the GPU kernel.

Numba compiles these functions for numbers (`eviction`), Triton for the rows of a layer (`device/claim.py`), and they
run as they are on arrays of numpy or torch. Whole numbers, because all of them have to choose the same victim: floating
point rounds differently where a compiler fuses a product and a sum, or divides approximately. So they hold nothing but
operators, and get their constants as arguments. Probabilities are in units of 1 / `unit`, and no product of two exceeds
64 bits.
"""

from typing import Any

UNIT = 1 << 20
"""A probability of one."""
EVENT = 1 << 16
"""A wait of one event: fine enough that rates which differ by 0.1 % order two experts."""


def fixed(value: float) -> int:
    """Returns a probability, rounded to units of 1 / `UNIT`."""
    return round(value * UNIT)


def next_rate(rate: Any, used: Any, speed: Any, unit: Any) -> Any:
    """Returns an exponential mean of uses after one event of its layer.

    Args:
        rate: the mean before it, 0 to `unit`.
        used: 1 if the event used the expert, else 0.
        speed: weight of the event in the mean, 0 to `unit`.
        unit: `UNIT`.
    """
    return rate - rate * speed // unit + used * speed


def use_chance(quick: Any, slow: Any, weight: Any, floor: Any, unit: Any) -> Any:
    """Returns the chance that an event uses an expert, at least `floor`, from a fast and a slow mean of its uses."""
    mean = (weight * quick + (unit - weight) * slow) // unit
    return floor + (unit - floor) * mean // unit


def mixed_chance(chance: Any, expected: Any, share: Any, unit: Any) -> Any:
    """Returns the mean of a chance from recent use and a predicted one, whose weight is `share`."""
    return ((unit - share) * chance + share * expected) // unit


def expected_wait(chance: Any, layers: Any, event: Any, unit: Any) -> Any:
    """Returns the events until an expert's next use beyond its layer's next event, in units of 1 / `event`.

    An expert that an event uses with chance p waits for 1 / p - 1 events of its layer in the mean, and as many of each
    other layer (`NextUse`).
    """
    return layers * (unit * event // chance - event)
