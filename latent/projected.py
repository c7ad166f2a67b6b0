"""Read the styles that a projector saved."""

import os
import zipfile
import zlib

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.disk_failures import retrying


def read_projected_w(path: str | os.PathLike, G: nn.Module) -> Tensor:
    """Return the styles of --projected-w: float32 [M, L, W], from the entry "w" of an npz file.

    Raises UserError, one line, when the file is missing, no npz, or holds styles of another network.
    """
    flag = f"--projected-w={path}"
    expected = f"expected an .npz file with an array w of shape [M, {G.num_ws}, {G.w_dim}], as a projector writes it"
    try:
        w = retrying(lambda: _read_array(path, flag, expected), path)
    except FileNotFoundError as error:
        raise UserError(f"{flag} does not exist; {expected}") from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{flag} cannot be read ({error.strerror or error}); {expected}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{flag} cannot be read as an npz file ({error}); {expected}") from error
    if w.ndim != 3 or w.shape[1:] != (G.num_ws, G.w_dim) or not len(w):
        raise UserError(f"{flag} has w of shape {list(w.shape)}; expected [M, {G.num_ws}, {G.w_dim}] for this network")
    if w.dtype.kind not in "fiu" or not np.isfinite(w).all():
        raise UserError(f"{flag} has w of type {w.dtype} with values that are no finite numbers; expected those")
    return torch.from_numpy(w.astype(np.float32))


def _read_array(path: str | os.PathLike, flag: str, expected: str) -> np.ndarray:
    with open(path, "rb") as file:
        start = file.read(len(np.lib.format.MAGIC_PREFIX))
    if start and not start.startswith((b"PK", np.lib.format.MAGIC_PREFIX)):  # numpy would advise to unpickle it
        raise UserError(f"{flag} is not an npz file; {expected}")
    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise UserError(f"{flag} is a single array; {expected}")
    with arrays:
        if "w" not in arrays.files:
            found = ", ".join(arrays.files[:5]) or "nothing"
            raise UserError(f"{flag} has no array w (it holds {found}); {expected}")
        return arrays["w"]
