"""Decide which images show one lesion, and which class each has: exact numbers of images a class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imagesets.phantoms.fields import stream

_SIZES, _CLASSES = 40, 41  # purposes of random streams
_SINGLE, _PAIR = 0.70, 0.20  # parts of the lesions with one image and with two; the others have three


@dataclass(frozen=True, kw_only=True)
class Plan:
    """labels: class numbers [N] int64; lesions: numbers [N] int64, equal for images of one lesion."""

    labels: np.ndarray
    lesions: np.ndarray


def lesion_numbers(seed: int, count: int) -> np.ndarray:
    """Return the number of the lesion that each image shows, [count] int64.

    A longer list starts with the shorter one.
    """
    draws = stream(seed, _SIZES, 0).random(count)
    sizes = 1 + (draws > _SINGLE) + (draws > _SINGLE + _PAIR)
    return np.repeat(np.arange(count), sizes)[:count]


def make_plan(counts: Sequence[int], seed: int) -> Plan:
    """Give whole lesions to classes at random, and the images of single ones so that the counts are met.

    A lesion of several images that fits into no class any more is divided: its images become lesions of their own.
    """
    lesions = lesion_numbers(seed, sum(counts))
    sizes = np.bincount(lesions)
    draws = stream(seed, _CLASSES, 0).random(2 * len(lesions))
    order = np.argsort(draws[:len(sizes)] - sizes, kind="stable")  # large ones first, at random among equals
    class_of, remaining = _deal(order[sizes[order] > 1].tolist(), sizes.tolist(), draws[len(sizes):].tolist(), counts)
    labels = np.array([class_of.get(lesion, -1) for lesion in lesions.tolist()], np.int64)
    alone = np.flatnonzero(labels < 0)
    labels[alone] = np.repeat(np.arange(len(counts)), remaining)[np.argsort(draws[-len(alone):] if len(alone) else [])]
    divided = alone[sizes[lesions[alone]] > 1]
    lesions[divided] = len(lesions) + np.arange(len(divided))  # beyond the number of any other
    return Plan(labels=labels, lesions=lesions)


def _deal(lesions: list[int], sizes: list[int], draws: list[float],
          counts: Sequence[int]) -> tuple[dict[int, int], list[int]]:
    """Return {lesion: class} and the images that each class still needs; a class is as likely as it still has room."""
    class_of, remaining = {}, list(counts)
    for lesion, draw in zip(lesions, draws):
        room = [number if number >= sizes[lesion] else 0 for number in remaining]
        mark = draw * sum(room)
        if not mark:
            continue
        label = 0
        while mark > room[label]:
            mark -= room[label]
            label += 1
        class_of[lesion] = label
        remaining[label] -= sizes[lesion]
    return class_of, remaining
