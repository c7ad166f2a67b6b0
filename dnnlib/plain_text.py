"""Write any text with the letters that every font has."""

import unicodedata
from collections.abc import Callable


def to_ascii(text: str) -> str:
    """Take accents off, and put "?" for what else is no printable ASCII: Pillow's own font has only these letters."""
    letters = [letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter)]
    return "".join(letter if " " <= letter <= "~" else "?" for letter in letters)


def fitted(text: str, width: float, width_of: Callable[[str], float]) -> str:
    """Return a text as it is where it fits, else its beginning and "..".

    width_of: returns the width of a text, in the units of `width`
    """
    if width_of(text) <= width:
        return text
    low, high = 0, len(text) - 1  # letters that fit, as far as known; letters that may
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width_of(f"{text[:middle]}..") <= width else (low, middle - 1)
    return f"{text[:low]}.."
