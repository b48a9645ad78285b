"""Cases that model_input and noise_estimate share: clips, coefficients and UNets of each kind."""

import torch
from torch import Tensor

WEIGHTS = {"predicts": 0, "blend": 1, "residual": 3}
SHAPES = {  # B, N, C, H, W; patch size; kind; whether guided
    "base": ((2, 1, 3, 64, 64), 4, "blend", True),
    "residual": ((1, 16, 3, 64, 64), 4, "residual", True),
    "latents": ((2, 1, 4, 32, 32), 1, "predicts", True),
    "model": ((1, 16, 8, 16, 16), 1, "residual", True),
    "many": ((1, 16, 3, 128, 128), 2, "residual", False),
    "odd": ((2, 5, 3, 6, 10), 2, "residual", True),
    "video": ((2, 3, 2, 7, 11), 1, "blend", True),
    "patch_of_three": ((1, 2, 1, 9, 6), 3, "residual", False),
    "tiny": ((1, 1, 1, 1, 1), 1, "blend", False),
    "single_frame": ((2, 1, 2, 4, 4), 2, "residual", True),
    "plain": ((1, 2, 3, 5, 3), 1, "predicts", False),
}
SMALL = ("odd", "video", "patch_of_three", "tiny", "single_frame", "plain")
SETS = {
    "all": SHAPES,
    "small": {name: SHAPES[name] for name in SMALL},
    "gpu": {name: SHAPES[name] for name in ("model", "odd")},
}


def clip_case(shape, dtype=torch.float32, device="cpu") -> dict[str, Tensor]:
    """z, coeffs of three steps, none of whose numbers are special, and the second step."""
    random = torch.Generator().manual_seed(sum(shape))
    return {
        "z": (2 * torch.randn(shape, generator=random)).to(device, dtype),
        "coeffs": (0.5 + torch.rand(3, shape[1], 5, generator=random)).to(device),
        "step": torch.tensor([1], dtype=torch.int32, device=device),
    }
