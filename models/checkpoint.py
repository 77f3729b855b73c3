"""Reading parts of tensors out of a folder of safetensors files, without reading the rest.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes, little-endian, with the length of
a JSON header; the header, which gives each tensor's dtype, shape and place; the tensors' bytes, row-major.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pplx_jax.models.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What the safetensors library accepts as well.
_MAX_HEADER = 100_000_000
# Rows that are wanted in part are read in part where the part is at least so long.
_MIN_RUN = 4096
# Most bytes of whole rows that are read at once where a narrow part of them is wanted.
_WINDOW = 8 << 20

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is.

    Attributes:
      file: its file.
      dtype: as the format names it, such as "BF16".
      shape: its shape.
      offset: of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      CheckpointError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: give the folder of a Hugging Face checkpoint") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read as JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file.

    Raises:
      CheckpointError: the file is missing, truncated or corrupt.
    """
    again = "download the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file: {again}")
            (length,) = struct.unpack("<Q", start)
            if length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: its header would have {length} bytes, "
                    f"the file has {size}: {again}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}): {again}") from error
    try:
        header = json.loads(text)
        found = {
            name: _tensor(path, name, entry, 8 + length, size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has a corrupt header ({error!r}): {again}") from error
    return found


def _tensor(path: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
        raise ValueError(f"{name}: {entry}")
    if base + end > size:
        raise CheckpointError(
            f"{path} is truncated: tensor {name} ends at byte {base + end}, the file at {size}: "
            f"download the file again"
        )
    dtype = str(entry["dtype"])
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for {dtype} {list(shape)}")
    return TensorInfo(path, dtype, shape, base + begin)


class Checkpoint:
    """The tensors of a folder. Opens every file once, reads headers only; thread-safe for reading.

    Args:
      folder: with ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names.

    Attributes:
      tensors: by name.
      bytes_read: of tensors, so far.

    Raises:
      CheckpointError: a file is missing, truncated or corrupt.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        for path in self._paths():
            self.tensors.update(read_header(path))

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is no folder: give the folder of a Hugging Face checkpoint")
        index = self.folder / INDEX
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no weight_map: download it again")
            names = sorted(set(map(str, weight_map.values())))
            if outside := [name for name in names if Path(name).name != name]:
                raise CheckpointError(f"{index} names a file outside of the folder: {outside[0]!r}")
            paths = [self.folder / name for name in names]
            if missing := [path.name for path in paths if not path.exists()]:
                raise CheckpointError(
                    f"{self.folder} lacks {len(missing)} of the {len(paths)} files that {INDEX} names: "
                    f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; download them"
                )
            return paths
        if (self.folder / SINGLE).exists():
            return [self.folder / SINGLE]
        raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX}: is the download complete?")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray[Any, Any]:
        """A part of a tensor.

        Args:
          name: of the tensor.
          index: a slice of step 1 for each of its dimensions; fewer: all of the others.

        Raises:
          CheckpointError: the file has shrunk since it was opened, or can't be read.
        """
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        spans = [part.indices(size)[:2] for part, size in zip(index, info.shape, strict=False)]
        spans += [(0, size) for size in info.shape[len(spans) :]]
        shape = tuple(stop - start for start, stop in spans)
        out = np.empty(shape, dtype)
        if not out.size:
            return out
        # Dimensions from `whole` on are wanted as a whole: so each combination of those before is one run.
        whole = len(shape)
        while whole and shape[whole - 1] == info.shape[whole - 1]:
            whole -= 1
        target = _as_bytes(out)
        if whole == len(shape) == 2 and shape[1] * dtype.itemsize < _MIN_RUN:
            self._columns(info, spans, out)
            return out
        run = math.prod(shape[max(whole - 1, 0) :]) * dtype.itemsize
        for number, offset in enumerate(_offsets(info.shape, spans, max(whole - 1, 0))):
            place = info.offset + offset * dtype.itemsize
            self._into(info.file, place, target[number * run : (number + 1) * run])
        return out

    def _columns(self, info: TensorInfo, spans: list[tuple[int, int]], out: np.ndarray[Any, Any]) -> None:
        """Narrow columns of a matrix: whole rows, a window of them at a time."""
        (first, last), (left, right) = spans
        width = info.shape[1]
        step = max(1, _WINDOW // (width * out.itemsize))
        for row in range(first, last, step):
            count = min(step, last - row)
            rows = np.empty((count, width), out.dtype)
            place = info.offset + row * width * out.itemsize
            self._into(info.file, place, _as_bytes(rows))
            out[row - first : row - first + count] = rows[:, left:right]

    def _into(self, path: Path, place: int, target: memoryview) -> None:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = os.open(path, os.O_RDONLY)
        done = 0
        while done < len(target):
            try:
                count = os.preadv(file, [target[done:]], place + done)
            except OSError as error:
                raise CheckpointError(f"{path} can't be read ({error.strerror}): check the disk") from error
            if not count:
                raise CheckpointError(f"{path} has become shorter while it was read: download it again")
            done += count
        self.bytes_read += done

    def close(self) -> None:
        """Closes the files. Idempotent; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _as_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """The array's own memory."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _offsets(shape: tuple[int, ...], spans: list[tuple[int, int]], depth: int) -> Iterator[int]:
    """Where the runs start, in elements; the dimensions before `depth` are walked one by one."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    base = sum(span[0] * stride for span, stride in zip(spans, strides, strict=True))
    for where in np.ndindex(*(stop - start for start, stop in spans[:depth])):
        yield base + sum(i * stride for i, stride in zip(where, strides, strict=False))
