"""Kernels of rows on buffers that end before inaccessible pages.

An overrun kills the process. Prints each instruction set that passed; test_row_kernels.py runs it.
"""

import test_geglu
import test_group_norm_silu
import test_layer_norm
import test_spatial_attention
import test_temporal_attention
import torch
from seeded import normal
from torch import Tensor
from triton_tools import guarded

from vfengine.native import vfengine_native
from vfengine.ops._dispatch import DTYPE_NUMBERS as NUMBERS
from vfengine.plan import gather as tables
from vfengine.plan.packing import pack

DTYPES = (torch.float32, torch.bfloat16)
KEYS = {"keys": (2, 5, 33, 1, 8), "odd_head": (1, 19, 7, 1, 24), "one": (1, 1, 1, 1, 8)}
FRAMES = {"odd": (1, 5, 3, 1, 8), "even": (2, 4, 1, 1, 24), "one": (1, 1, 1, 1, 8)}
LINEAR = ((1, 2, 1), (7, 22, 71), (8, 34, 16), (13, 10, 33), (49, 6, 130))  # rows, depth, columns


def product(
    x: Tensor, table: Tensor | None, weight: Tensor, items: tuple[int, int, int], geglu: bool
) -> Tensor:
    """row_matmul of guarded buffers with bias and residual; items: (number, rows, rows of x)."""
    count, rows, rows_in = items
    dtype, columns = x.dtype, len(weight) // (1 + geglu)
    weights = guarded(pack(weight, None, dtype, "geglu" if geglu else None).packed)
    bias, out = (
        guarded(normal(len(weight), seed=3)),
        guarded(normal(count * rows, columns).to(dtype)),
    )
    before = out.clone()
    table = None if table is None else guarded(table)
    source = vfengine_native.RowSource(
        x=x.data_ptr(),
        stride=x.shape[1],
        width=x.shape[1],
        table=0 if table is None else table.data_ptr(),
        taps=1 if table is None else len(table),
        item_rows=rows_in,
    )
    args = vfengine_native.RowMatmulArgs(
        sources=(source,),
        weights=weights.data_ptr(),
        bias=bias.data_ptr(),
        residual=out.data_ptr(),
        residual_stride=columns,
        out=out.data_ptr(),
        out_stride=columns,
        rows=count * rows,
        item_rows=rows,
        columns=columns,
        epilogue=int(geglu),
        dtype=NUMBERS[dtype],
    )
    vfengine_native.row_matmul_cpu(args, 2)
    if table is not None:
        padded = torch.cat([x.view(count, rows_in, -1), x.new_zeros(count, 1, x.shape[1])], 1)
        x = padded[:, table.long()].transpose(1, 2).flatten(0, 1).flatten(1)  # -1: the zeros
    expected = x.double() @ weight.to(dtype).double().t() + bias.double()
    if geglu:
        value, gate = expected.chunk(2, -1)
        expected = value * torch.nn.functional.gelu(gate)
    expected += before.double()
    assert (out.double() - expected).norm() <= 0.01 * expected.norm()
    return out


def products(dtype: torch.dtype) -> None:
    for rows, depth, columns in LINEAR:
        x = guarded(normal(rows, depth).to(dtype))
        for geglu in (False, True):
            weight = normal(columns * (1 + geglu), depth, seed=2)
            product(x, None, weight, (1, rows, rows), geglu)
    for height, width, channels in ((3, 5, 6), (1, 1, 2), (4, 3, 18)):
        x = guarded(normal(2 * height * width, channels).to(dtype))
        reads = [tables.same, tables.halved] + [tables.halved_after] * (height > 1)
        for table in (of(height, width) for of in reads):
            weight = normal(19, 9 * channels, seed=2)
            product(x, table, weight, (2, table.shape[1], height * width), False)


def norms_and_attention(dtype: torch.dtype) -> None:
    def case_of(case: dict) -> dict:
        return {k: guarded(v) if isinstance(v, Tensor) else v for k, v in case.items()}

    for shape in ((5, 77, 20), (7, 11), (1,), (3, 333)):
        test_layer_norm.assert_matches(
            case_of(test_layer_norm.make_case(shape, dtype)), "cpu", guarded
        )
    for shape in ((5, 7), (3, 38), (1, 1)):
        case = case_of(test_geglu.make_case((shape[0], 2 * shape[1]), dtype))
        test_geglu.assert_matches(case, "cpu", guarded)
    for shape in KEYS.values():
        for form in ("separate", "packed"):
            case = test_spatial_attention.make_case(shape, dtype, form, place=guarded)
            test_spatial_attention.assert_matches(case, "cpu", guarded)
    for shape in FRAMES.values():
        for biased in (False, True):
            case = case_of(test_temporal_attention.make_case(shape, dtype, biased))
            test_temporal_attention.assert_matches(case, "cpu", guarded)
    for shape in test_group_norm_silu.SETS["small"].values():
        for form in test_group_norm_silu.FORMS.values():
            case = test_group_norm_silu.make_case(shape, dtype, form, place=guarded)
            test_group_norm_silu.assert_matches(case, "cpu", guarded)


def main() -> None:
    for isa in vfengine_native.cpu_isas:
        vfengine_native.set_cpu_isa(isa)
        for dtype in DTYPES:
            products(dtype)
            norms_and_attention(dtype)
        print(isa)


if __name__ == "__main__":
    main()
