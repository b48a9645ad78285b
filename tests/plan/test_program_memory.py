"""The memory of programs: which buffers share a place (vfengine/plan/memory.py, builder.py)."""

import gc
import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seeded import filled, normal
from test_planned import inputs, network, plan
from test_row_kernels import Case, multiply

from vfengine.models import (
    AutoencoderConfig,
    Decoder,
    PlannedDecoder,
    PlannedTextEncoder,
    TextEncoder,
    TextEncoderConfig,
)
from vfengine.plan.builder import Builder, Source
from vfengine.plan.memory import Block, arrange
from vfengine.plan.packing import pack
from vfengine.plan.program import Program, Rows

blocks = st.builds(
    lambda nbytes, first, calls: Block(nbytes, first, first + calls),
    st.integers(1, 5000),
    st.integers(0, 12),
    st.one_of(st.integers(0, 6), st.just(math.inf)),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(blocks, max_size=40))
def test_blocks_that_a_call_needs_at_once_are_disjoint_and_aligned(made):
    offsets, size = arrange(made)
    places = list(zip(offsets, made, strict=True))
    for offset, block in places:
        assert offset >= 0 and offset % 64 == 0 and offset + block.nbytes <= size
    for (a, one), (b, other) in itertools.combinations(places, 2):
        if one.first <= other.last and other.first <= one.last:
            assert a + one.nbytes <= b or b + other.nbytes <= a


def test_blocks_share_what_no_call_needs_twice():
    assert arrange([]) == ([], 0)
    one_after_the_other = [Block(640, first, first) for first in range(5)]
    assert arrange(one_after_the_other) == ([0] * 5, 640)
    small, large = Block(64, 0, 2), Block(640, 1, 1)
    assert arrange([small, large, Block(100, 3, 3)]) == ([640, 0, 0], 704)


def sums(build: Builder, x: Rows, count: int, **options) -> Rows:
    """x multiplied by a square matrix `count` times."""
    for _ in range(count):
        weights = pack(normal(x.width, x.width), None, torch.float32)
        x = build.matmul(x, weights, **options)
    return x


def test_a_buffer_lasts_to_the_last_call_that_names_it():
    build = Builder(torch.float32)
    x = build.rows(32, 16)
    assert len(build.program(sums(build, x, 9)).arena) == 2 * x.nbytes

    build = Builder(torch.float32)
    x = build.rows(32, 16)
    kept = sums(build, x, 1)
    out = build.matmul(
        [Source(sums(build, kept, 4)), Source(kept)], pack(normal(16, 32), None, torch.float32)
    )
    assert len(build.program(out).arena) == 3 * x.nbytes


def test_results_and_buffers_that_no_call_names_are_left_alone():
    build = Builder(torch.float32)
    x, unnamed = build.rows(4, 16), build.rows(4, 16)
    first = sums(build, x, 1)
    program = build.program(first, sums(build, first, 3))
    program.view(x).fill_(1)
    program.view(unnamed).fill_(7)
    program.run()
    assert (program.view(unnamed) == 7).all()
    program.view(x).fill_(1)
    expected = multiply(Case([(torch.ones(4, 16), None, 0)], normal(16, 16), None), torch.float32)
    assert torch.equal(program.view(first), expected)


@pytest.mark.parametrize("read_again", [False, True])
def test_a_sum_is_written_over_what_it_adds_to_unless_that_is_read_again(read_again):
    build = Builder(torch.float32)
    x, added = build.rows(4, 16), build.rows(4, 16)
    out = sums(build, x, 1, residual=added)
    if read_again:
        sums(build, added, 1)
    program = build.program(out)
    assert (program.offset(out) == program.offset(added)) is not read_again

    build = Builder(torch.float32)
    x = build.rows(4, 16)
    program = build.program(out := sums(build, x, 1, residual=x))
    assert program.offset(out) != program.offset(x), "which the product itself reads"


def test_views_of_a_program_are_aligned_and_start_as_zeros():
    build = Builder(torch.bfloat16)
    buffers = [build.rows(3, 5), build.rows(1, 7, torch.float32), build.rows(2, 2)]
    program = build.program()
    for rows in buffers:
        view = program.view(rows)
        assert view.shape == (rows.count, rows.width) and view.dtype is rows.dtype
        assert view.data_ptr() % 64 == 0 and not view.any()
        view.fill_(1)
    assert isinstance(program, Program)


def small_unet():
    unet = plan(network("video, context and classes"))
    return unet, lambda: unet(**inputs("video, context and classes"))


def small_decoder():
    config = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)
    decoder = PlannedDecoder(filled(Decoder(config)), torch.float32)
    return decoder, lambda: decoder(normal(1, 4, 4, 4))


def small_text_encoder():
    config = TextEncoderConfig(50, 20, 32, 2, 4, 64)
    encoder = PlannedTextEncoder(filled(TextEncoder(config)), torch.float32)
    return encoder, lambda: encoder(torch.arange(20)[None])


@pytest.mark.parametrize("make", [small_unet, small_decoder, small_text_encoder])
def test_weights_leave_memory_with_the_last_reference_to_their_network(make):
    """At once: a pipeline's next network needs their room before Python looks for cycles."""
    network, run = make()
    weights = [weakref.ref(tensor) for tensor in network.buffers()]
    gc.collect()
    gc.disable()
    try:
        run()
        del network, run
        assert weights and not any(weight() is not None for weight in weights)
    finally:
        gc.enable()
