"""Find the class that projections start from: --class."""

from typing import Literal

from dnnlib.cli import UserError
from imagesets.class_names import known_classes
from latent.classes import Classes

AUTO = "auto"  # try each
StartClass = int | Literal["auto"] | None


def parse_start(classes: Classes, text: str | None) -> StartClass:
    """Return the number of a class, AUTO, or None where none is given. A name wins over "auto". Raises UserError."""
    if text is None:
        return None
    if classes.count > 0 and text.strip() not in (classes.names or ()):
        if text.strip().lower() == AUTO:
            return AUTO
        if text.strip() == "all":
            raise UserError(f"--class is all; expected one class, or {AUTO} to try each")
    found = classes.choose(text)
    if len(found) > 1:
        raise UserError(f"--class names {len(found)} classes; expected one, or {AUTO} to try each")
    return found[0]


def starts_of_target(classes: Classes, text: str | None) -> list[int | None]:
    """Return the classes that one image is started from; [None] of an unconditional network. Raises UserError."""
    start = parse_start(classes, text)
    if start is None and classes.count > 0:
        raise UserError("--class is missing, and this network makes images of a class; expected "
                        f"{known_classes(classes.names, classes.count)}, or {AUTO} to try each")
    return list(range(classes.count)) if start == AUTO else [start]
