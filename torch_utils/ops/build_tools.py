"""Find the programs that build operators, and ask them about themselves once."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dnnlib.cli import UserError
from dnnlib.files import atomic_write

_NAMES = ("g++", "c++", "clang++")
_ANSWER_SECONDS = 60


class BuildError(UserError):
    """A library of operators is not there and cannot be built; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """A C++ compiler, and how to call it."""

    command: tuple[str, ...]  # programs by their whole paths, and the options that $CXX names
    version: str  # all that it says of itself

    @property
    def program(self) -> str:
        """The compiler itself, where the command starts it by another program such as ccache."""
        return [word for word in self.command if os.path.isabs(word)][-1]

    @property
    def title(self) -> str:
        return f"{shlex.join(self.command)}: {self.version.splitlines()[0]}"


def find_program(name: str) -> str | None:
    """Return the path of a program on PATH, or where systems keep programs when PATH does not say."""
    found = shutil.which(name, path=_search_path())
    if found is None:
        return None
    # One path where /bin is /usr/bin. A link of another name stays: ccache knows by it which compiler is meant.
    return os.path.join(os.path.realpath(os.path.dirname(found)), os.path.basename(found))


def find_compiler(cache: Path) -> Compiler:
    """Return $CXX, else the first of g++, c++ and clang++. Raises BuildError.

    cache: folder where answers of programs are kept
    """
    words = [os.path.expanduser(word) for word in shlex.split(os.environ.get("CXX", ""))]
    if words and find_program(words[0]) is None:
        raise BuildError(f"CXX is {os.environ['CXX']!r}; expected a C++ compiler: set it to one, or unset it")
    if not words:
        words = [name for name in _NAMES if find_program(name)][:1]
    if not words:
        raise BuildError(f"no C++ compiler is found; expected {', '.join(_NAMES)} or $CXX: install the package g++ "
                         "(gcc-c++ on Fedora, gxx from conda-forge)")
    command = tuple(word if word.startswith("-") else find_program(word) or word for word in words)
    return Compiler(command=command, version=answer([*command, "--version"], cache))


def find_ninja() -> str:
    """Return the path of ninja: pip's, else the system's. Raises BuildError."""
    with suppress(ImportError):
        import ninja

        path = os.path.join(ninja.BIN_DIR, "ninja")
        if os.path.isfile(path):
            return path
    path = find_program("ninja")
    if path is None:
        raise BuildError("ninja is not found, which starts the compilers: pip install ninja")
    return path


def answer(command: list[str], cache: Path) -> str:
    """Return what a program prints, from `cache` when it was asked before and its file is the same.

    LIMIT: a program that only starts another one is not asked again when the other one changes.
    Raises BuildError when the program fails.
    """
    programs = [[os.path.realpath(word), os.stat(word).st_mtime_ns, os.stat(word).st_size]
                for word in command if os.path.isabs(word) and os.path.isfile(word)]
    kept = cache / "answers" / f"{hashlib.sha256(json.dumps([command, programs]).encode()).hexdigest()[:32]}.txt"
    with suppress(OSError):
        return kept.read_text(encoding="utf-8")
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                             env=environment(), check=False, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{shlex.join(command)} cannot be run ({error})") from error
    if run.returncode or not run.stdout.strip():
        says = " ".join(run.stdout.split())[:200]
        raise BuildError(f"{shlex.join(command)} ended with code {run.returncode}: {says or 'it printed nothing'}")
    with suppress(OSError):  # Where the cache cannot be written, the program is asked each time.
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept, text=True) as file:
            file.write(run.stdout)
    return run.stdout


def environment(**more: str) -> dict[str, str]:
    """Return the environment for compilers: messages in English, and a PATH on which they find the system's parts."""
    return {**os.environ, "LC_ALL": "C", "PATH": _search_path(), **more}


def _search_path() -> str:
    return os.pathsep.join(part for part in (os.environ.get("PATH"), os.defpath) if part)
