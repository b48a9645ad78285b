"""benchmarks/study_int8.py: the error of its quantiser, what it quantises, and that it runs."""

import pytest
import torch
from conftest import TINY_LABELS, benchmark_file, tiny_config

from vfengine.models import UNet

study = benchmark_file("study_int8")


def by_row(x):
    return study.quantised(x, x.abs().amax(-1, keepdim=True))


def test_uniform_rows_err_by_a_uniform_rounding():
    """Step a/127 and error step/sqrt(12), on rows of RMS a/sqrt(3): 1/254."""
    x = torch.rand(64, 4096, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[:, 0] = 1
    error = float((by_row(x) - x).norm() / x.norm())
    assert error == pytest.approx(1 / 254, rel=0.01)


def test_rows_of_any_size_keep_their_largest_number_and_their_zeros():
    x = torch.tensor([[1e-3, -4e-3, 0.0], [2e5, 3e5, 0.0], [0.0, 0.0, 0.0]])
    out = by_row(x)
    step = x.abs().amax(1, keepdim=True) / 127
    assert torch.all((out - x).abs() <= step * 0.5001)
    assert torch.equal(out[:, 2], x[:, 2]) and torch.equal(out[2], x[2])
    assert out[0, 1].item() == pytest.approx(-4e-3) and out[1, 1].item() == pytest.approx(3e5)


def test_embeddings_and_the_ends_are_left_alone():
    unet = UNet(tiny_config().residual)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    after = study.quantised_unet(unet, study.Form()).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("down") and name.endswith("conv1.weight") for name in changed)
    assert any("spatial" in name for name in changed) and any(
        "temporal" in name for name in changed
    )
    assert not any(part in name for name in changed for part in study.KEPT)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


@pytest.mark.filterwarnings("ignore:this CPU has no bf16 instructions")
def test_it_runs(tiny_checkpoint, tmp_path):
    rows = study.main(
        ["--model", str(tiny_checkpoint), "--label", *TINY_LABELS[:2], "--every", "1"]
        + ["--num-inference-steps", "2", "--work", str(tmp_path)]
    )
    errors = {(row.case, row.contender): row.value for row in rows if row.metric == "error"}
    assert {case for case, _ in errors} == {"base network", "residual network"}
    for case in ("base network", "residual network"):
        assert 0 < errors[case, "its weights alone"] < 100
        assert errors[case, study.BF16] < errors[case, "W8A8"] < 100
    assert {file.name for file in tmp_path.iterdir()} == {"fp32.png", "bf16.png", "W8A8.png"}


def test_rejects_a_label_that_the_model_has_not(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"expected labels of \('cartwheel', .* got \['swim'\]"):
        study.main(["--model", str(tiny_checkpoint), "--label", "swim"])


def test_rejects_a_plain_model(tiny_video_checkpoint):
    with pytest.raises(ValueError, match="expected a decomposed model, got vdm"):
        study.main(["--model", str(tiny_video_checkpoint), "--label", TINY_LABELS[0]])
