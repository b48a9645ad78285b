"""y_s = Σ_t softmax_t(q_s · k_t / √D) v_t of each frame and head      csrc/spatial_attention.h

q, y: [F, Sq, H D], k, v: [F or 1, Sk, H D]; a sequence is a frame of kernels/attention.py.
"""

from torch import Tensor

from vfengine.ops.spatial_attention import row_stride

from .attention import launch_arguments as attention_arguments
from .attention import launch_attention


def launch(q: Tensor, k: Tensor, v: Tensor, num_heads: int, out: Tensor) -> None:
    """Write y into out. The arguments are those of the op, checked."""
    launch_attention(launch_arguments(q, k, v, num_heads, out))


def launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, object]]:
    """The grid, arguments and constants of attention_kernel."""
    (frames, q_len, width), k_len = q.shape, k.shape[1]
    q_row, k_row = row_stride(q), row_stride(k)
    k_frame = k_len * k_row if k.shape[0] > 1 else 0
    strides = (q_len * q_row, 0, q_row, k_frame, 0, k_row, q_len * width, 0, width)
    lengths, head_dim = (q_len, k_len), width // num_heads
    return attention_arguments(
        (q, k, v, out), None, strides, (frames, 1), lengths, num_heads, head_dim
    )
