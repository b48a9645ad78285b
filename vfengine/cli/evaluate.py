"""`vfengine eval`: distances between two sets of clips, by features that are in files.

    vfengine eval frechet --real a.npy --generated b.npy
    vfengine eval is --generated probabilities.npy --splits 10

Features are [n, D] in .npy or .safetensors files, read without executing code. The arithmetic is
vfengine/metrics.py's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ending import ended
from .flags import SWITCH, Parser, Setting, UsageError, add_flags, one_line, text, whole
from .start import short_name
from .streams import say

if TYPE_CHECKING:
    from torch import Tensor

EVAL = "python -m vfengine.eval"

# name: the distance it stands for, what it needs --real for
DISTANCES = {
    "frechet": "Fréchet distance of the features' normal distributions",
    "kernel": "kernel distance: squared maximum mean discrepancy, cubic kernel, unbiased",
    "is": "inception score, of rows of class probabilities",
    "fvd": "frechet, on features of a video network: the features decide whether it is FVD",
    "kvd": "kernel, likewise",
}
_ALIASES = {"fvd": "frechet", "kvd": "kernel"}

SETTINGS = (
    Setting("real", "features", text("FILE"), "features of real clips, .npy or .safetensors"),
    Setting(
        "generated",
        "features",
        text("FILE"),
        "features of generated clips; for is: their class probabilities",
        required=True,
    ),
    Setting(
        "name",
        "features",
        text("NAME"),
        "tensor to read from .safetensors files",
        None,
        "the only one",
    ),
    Setting("splits", "features", whole(1, 100_000), "parts of is", None, "10"),
    Setting("json", "where to", SWITCH, "print one machine-readable line", False),
)


def eval_parser(program: str = EVAL) -> Parser:
    """The distance's name, and all flags, each absent from the result unless it is used."""
    distances = "\n".join(f"  {name:8} {words}" for name, words in DISTANCES.items())
    parser = Parser(
        prog=program,
        description="Compare two sets of clips by features that some network read in them.\n\n"
        f"distances:\n{distances}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("distance", choices=DISTANCES, metavar="DISTANCE", help="one of the above")
    add_flags(parser, SETTINGS)
    parser.set_defaults(**{setting.name: setting.default for setting in SETTINGS})
    return parser


def main(argv: Sequence[str] | None = None, program: str = EVAL) -> int:
    """Runs one command line; returns the exit status.

    program: how the command was called, for help and errors
    """

    def run() -> None:
        settings = eval_parser(program).parse_args(argv)
        result = _evaluate(settings)
        say(json.dumps(result) if settings.json else _words(result))

    return ended(run, short_name(program), less_memory="fewer features")


def _evaluate(settings: argparse.Namespace) -> dict[str, Any]:
    distance = _ALIASES.get(settings.distance, settings.distance)
    if (settings.real is None) is not (distance == "is"):
        problem = "takes no --real" if distance == "is" else "needs --real"
        raise UsageError(f"{settings.distance} {problem}")
    if settings.splits is not None and distance != "is":
        raise UsageError(f"{settings.distance} takes no --splits")
    generated = read_features(settings.generated, settings.name)
    from .. import metrics  # with torch

    result = {"distance": settings.distance}
    if distance == "is":
        splits = 10 if settings.splits is None else settings.splits
        mean, deviation = metrics.inception_score(generated, splits)
        result |= {"value": mean, "standard_deviation": deviation, "splits": splits}
    else:
        real = read_features(settings.real, settings.name)
        compare = getattr(metrics, f"{distance}_distance")
        result |= {"value": compare(real, generated), "real": list(real.shape)}
    return result | {"generated": list(generated.shape)}


def _words(result: dict[str, Any]) -> str:
    sets = [f"{result[name][0]} {name}" for name in ("real", "generated") if name in result]
    spread = f" ± {result['standard_deviation']:.6g}" if "standard_deviation" in result else ""
    width = result["generated"][1]
    return f"{result['distance']}: {result['value']:.6g}{spread} ({', '.join(sets)}; {width} wide)"


# -- files -----------------------------------------------------------------------------------------


def read_features(file: str | Path, name: str | None = None) -> Tensor:
    """Features [n, D] of a float dtype, n and D >= 1, all finite.

    name: of the tensor in a .safetensors file that holds several

    Raises OSError for a file that is not there; ValueError, naming the file, for one of another
    format, shape or dtype, and for values that are not finite.
    """
    file = Path(file)
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors}
    if file.suffix.lower() not in readers:
        raise ValueError(f"{file}: expected a file of features: .npy or .safetensors")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    features = readers[file.suffix.lower()](file, name)
    if not features.is_floating_point():
        raise ValueError(f"{file}: expected a float dtype, got {_dtype(features)}")
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{file}: expected features [n, D], got {list(features.shape)}")
    bad = ~features.isfinite().all(dim=1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{file}: {int(bad.sum())} rows are not finite, the first is row {first}")
    return features


def _dtype(features: Tensor) -> str:
    return str(features.dtype).removeprefix("torch.")


def _read_npy(file: Path, name: str | None) -> Tensor:
    import numpy as np
    import torch

    if name is not None:
        raise ValueError(f"{file}: a .npy file has no names, so it takes no --name")
    try:
        values = np.load(file, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="))))
    except (ValueError, TypeError, EOFError) as error:  # objects, cut off, no NumPy file, no number
        raise ValueError(f"{file}: cannot be read as features ({one_line(error)})") from error


def _read_safetensors(file: Path, name: str | None) -> Tensor:
    from ..files import open_tensors

    with open_tensors(file) as tensors:
        names = sorted(tensors.keys())
        if name is None and len(names) != 1:
            raise ValueError(
                f"{file}: holds {len(names)} tensors, --name says which: {', '.join(names)}"
            )
        name = names[0] if name is None else name
        if name not in names:
            raise ValueError(f"{file}: has no tensor {name!r}, expected one of {', '.join(names)}")
        return tensors.get_tensor(name)
