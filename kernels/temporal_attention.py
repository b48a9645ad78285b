"""y_n = Σ_m softmax_m(q_n · k_m / √D + bias_nm) v_m of each pixel and head, over its N frames
                                                                     csrc/temporal_attention.h

qkv: [B, N, P, 3 H D], y: [B, N, P, H D]; a sequence is (clip, pixel) of kernels/attention.py, its
rows are a frame apart. qkv moves once, y once, for N up to 64.
"""

from torch import Tensor

from .attention import launch_arguments as attention_arguments
from .attention import launch_attention


def launch(qkv: Tensor, bias: Tensor | None, num_heads: int, out: Tensor) -> None:
    """Write y into out. The arguments are those of the op, checked."""
    launch_attention(launch_arguments(qkv, bias, num_heads, out))


def launch_arguments(
    qkv: Tensor, bias: Tensor | None, num_heads: int, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of attention_kernel."""
    batch, frames, pixels, width = out.shape
    packed = (frames * pixels * 3 * width, 3 * width, pixels * 3 * width)
    dense = (frames * pixels * width, width, pixels * width)
    q, k, v = qkv.split(width, -1)
    return attention_arguments(
        (q, k, v, out),
        bias,
        (*packed, *packed, *dense),
        (batch, pixels),
        (frames, frames),
        num_heads,
        width // num_heads,
    )
