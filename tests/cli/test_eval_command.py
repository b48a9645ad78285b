"""vfengine eval: values are those of vfengine.metrics, and files are read with care."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vfengine import metrics
from vfengine.cli import evaluate

X = np.random.default_rng(0).normal(size=(12, 5))
Y = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)
P = np.random.default_rng(2).dirichlet(np.ones(4), size=20)


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Runs the command beside files of features: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    np.save("y.npy", Y)
    np.save("p.npy", P)
    save_file({"features": torch.from_numpy(Y)}, "y.safetensors")
    save_file({"a": torch.from_numpy(Y), "b": torch.from_numpy(X)}, "two.safetensors")

    def run(*argv):
        status = evaluate.main(list(map(str, argv)))
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("name", "distance"),
    [
        ("frechet", metrics.frechet_distance),
        ("fvd", metrics.frechet_distance),
        ("kernel", metrics.kernel_distance),
        ("kvd", metrics.kernel_distance),
    ],
)
@pytest.mark.parametrize("generated", ["y.npy", "y.safetensors"])
def test_a_distance(told, name, distance, generated):
    status, out, err = told(name, "--real", "x.npy", "--generated", generated, "--json")
    assert (status, err) == (0, "")
    value = distance(X, Y)
    assert json.loads(out) == {
        "distance": name,
        "value": value,
        "real": [12, 5],
        "generated": [9, 5],
    }
    _, out, _ = told(name, "--real", "x.npy", "--generated", generated)
    assert out == f"{name}: {value:.6g} (12 real, 9 generated; 5 wide)\n"


def test_an_inception_score(told):
    mean, deviation = metrics.inception_score(P, 4)
    status, out, _ = told("is", "--generated", "p.npy", "--splits", 4, "--json")
    assert status == 0
    assert json.loads(out) == {
        "distance": "is",
        "value": mean,
        "standard_deviation": deviation,
        "splits": 4,
        "generated": [20, 4],
    }
    assert "±" in told("is", "--generated", "p.npy")[1]


def test_a_tensor_is_chosen_by_its_name(told):
    argv = ["frechet", "--real", "two.safetensors", "--generated", "two.safetensors"]
    assert told(*argv, "--name", "b")[0] == 0
    assert "holds 2 tensors, --name says which: a, b" in told(*argv)[2]
    assert "has no tensor 'c', expected one of a, b" in told(*argv, "--name", "c")[2]


def test_big_endian_and_fortran_order_are_numbers_too(told):
    np.save("big.npy", X.astype(">f8"))
    np.save("fortran.npy", np.asfortranarray(X))
    values = {
        told("frechet", "--real", f, "--generated", "y.npy")[1]
        for f in ("big.npy", "x.npy", "fortran.npy")
    }
    assert len(values) == 1


class Executed:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


BAD = {
    "ints.npy": (np.ones((3, 5), int), "expected a float dtype, got int64"),
    "flat.npy": (np.ones(5), "expected features [n, D], got [5]"),
    "empty.npy": (np.ones((0, 5)), "expected features [n, D], got [0, 5]"),
    "wide.npy": (np.ones((3, 6)), "of one width, got [12, 5] and [3, 6]"),
    "one.npy": (np.ones((1, 5)), "at least 2 of each, got 12 and 1"),
    "nan.npy": (
        np.array([[1.0] * 5, [np.nan] * 5, [np.inf] * 5]),
        "2 rows are not finite, the first is row 1",
    ),
    "text.npy": (np.array([["a"]]), "cannot be read as features"),
    "objects.npy": (np.array([[Executed()]], dtype=object), "cannot be read as features"),
    "noise.npy": (b"noise", "cannot be read as features"),
    "cut.npy": (b"\x93NUMPY\x01\x00", "cannot be read as features"),
    "pickle.npy": (pickle.dumps(Executed()), "cannot be read as features"),
    "noise.safetensors": (b"noise", "not a complete safetensors file"),
    "features.pt": (b"", "expected a file of features: .npy or .safetensors"),
    "none.npy": (None, "none.npy: no such file"),
}


@pytest.mark.parametrize("file", BAD)
def test_a_bad_file_is_refused_by_name(told, file):
    content, words = BAD[file]
    if isinstance(content, bytes):
        Path(file).write_bytes(content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    status, out, err = told("frechet", "--real", "x.npy", "--generated", file)
    assert (status, out) == (2, "")
    assert err.startswith("vfengine.eval: error: ") and err.count("\n") == 1 and words in err
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["frechet", "--generated", "y.npy"], "frechet needs --real"),
        (["is", "--generated", "p.npy", "--real", "x.npy"], "is takes no --real"),
        (
            ["fvd", "--generated", "y.npy", "--real", "x.npy", "--splits", "2"],
            "fvd takes no --splits",
        ),
        (["is", "--generated", "p.npy", "--splits", "30"], "expected 1 to 20 splits, got 30"),
        (["is", "--generated", "x.npy"], "rows of probabilities"),
        (["is", "--generated", "p.npy", "--name", "a"], "takes no --name"),
        (["fid", "--generated", "y.npy"], "fid"),
        ([], "required"),
    ],
)
def test_bad_arguments(told, argv, words):
    status, out, err = told(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("vfengine.eval: error: ") and err.count("\n") == 1 and words in err


def test_help_says_what_fvd_is(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert "the features decide whether it is FVD" in capsys.readouterr().out
