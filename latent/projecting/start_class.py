"""Find the class, or the label, that projections start from: --class and --label."""

from typing import Literal

from dnnlib.cli import UserError
from imagesets.class_names import VECTOR, known_classes
from latent.classes import Classes, Label

AUTO = "auto"  # try each
StartClass = Label | Literal["auto"]


def parse_start(classes: Classes, text: str | None, label: str | None = None) -> StartClass:
    """Return the number of a class, AUTO, the vector of --label, or None where none is given. Raises UserError.

    A name wins over "auto".
    """
    if text is None and label is None:
        return None
    if label is None and classes.kind != VECTOR and classes.count > 0 and text.strip() not in (classes.names or ()):
        if text.strip().lower() == AUTO:
            return AUTO
        if text.strip() == "all":
            raise UserError(f"--class is all; expected one class, or {AUTO} to try each")
    found = classes.choose(text, label)
    if len(found) > 1:
        raise UserError(f"--class names {len(found)} classes; expected one, or {AUTO} to try each")
    return found[0]


def starts_of_target(classes: Classes, text: str | None, label: str | None = None) -> list[Label]:
    """Return the labels that one image is started from; [None] of an unconditional network. Raises UserError."""
    start = parse_start(classes, text, label)
    if start is None and classes.kind == VECTOR:
        return classes.choose(None)  # says that it is missing
    if start is None and classes.count > 0:
        raise UserError("--class is missing, and this network makes images of a class; expected "
                        f"{known_classes(classes.names, classes.count)}, or {AUTO} to try each")
    return list(range(classes.count)) if start == AUTO else [start]
