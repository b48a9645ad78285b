"""How many workers a cluster gets, and what each asks Ray for."""

import pytest

from vfengine.cluster.needs import needs_of
from vfengine.cluster.sizes import Needs, check_free, sizes
from vfengine.pipelines.load import load_pipeline

GB = 10**9
SMALL, LARGE = Needs(GB, GB, 0.2), Needs(20 * GB, 20 * GB, 0.2)
NODES = [{"CPU": 8, "memory": 64 * GB}, {"CPU": 4, "memory": 64 * GB}]
GPUS = [{"CPU": 16, "GPU": 4, "memory": 64 * GB}]


def counts(*argv, **options):
    found = sizes(*argv, **options)
    return found.base.count, found.residual.count, found.residual.threads


@pytest.mark.parametrize(
    "needs, asked, expected",
    [
        (SMALL, {}, (3, 12, 1)),
        (LARGE, {}, (1, 2, 1)),  # as far as memory reaches
        (SMALL, {"residual": 3}, (1, 3, 4)),  # fewer have more threads
        (SMALL, {"residual": 2, "base": 2}, (2, 2, 4)),
        (SMALL, {"base": 6}, (6, 6, 2)),
        (Needs(0, GB, 0.0), {}, (0, 12, 1)),
    ],
)
def test_workers_on_cpus(needs, asked, expected):
    assert counts(NODES, needs, **asked) == expected


def test_a_worker_of_each_kind_shares_a_core():
    found = sizes([{"CPU": 2, "memory": 8 * GB}], SMALL)
    assert found.base.options["num_cpus"] + found.residual.options["num_cpus"] == 1.0
    alone = sizes([{"CPU": 2, "memory": 8 * GB}], Needs(0, GB, 0.0))
    assert alone.residual.options["num_cpus"] == 1.0


def test_workers_on_gpus_share_one_where_both_networks_fit():
    assert counts(GPUS, SMALL, gpu_memory=80 * GB) == (1, 4, 1)
    found = sizes(GPUS, SMALL, gpu_memory=80 * GB)
    assert found.base.options["num_gpus"] + found.residual.options["num_gpus"] == 1.0
    apart = sizes(GPUS, LARGE, gpu_memory=30 * GB)
    assert (apart.base.count, apart.residual.count) == (1, 3)
    assert apart.base.options["num_gpus"] == apart.residual.options["num_gpus"] == 1.0


@pytest.mark.parametrize(
    "nodes, needs, options, words",
    [
        (NODES, SMALL, {"residual": 13}, "--residual-workers 13: the cluster has 12 CPU cores"),
        (NODES, SMALL, {"base": 13}, "--base-workers 13: the cluster has 12 CPU cores, on 2"),
        (NODES, LARGE, {"residual": 3}, "--residual-workers 3: .* memory for 2 of 40000 MB"),
        (NODES, Needs(0, GB, 0.0), {"base": 1}, "--base-workers 1: this model has no base network"),
        (GPUS, SMALL, {"residual": 5, "gpu_memory": 80 * GB}, "--residual-workers 5: .* 4 GPUs"),
        (GPUS, LARGE, {"residual": 4, "gpu_memory": 30 * GB}, "each of which holds one network"),
        (GPUS, LARGE, {"gpu_memory": 16 * GB}, "needs 20.0 GB of a GPU, which has 16.0"),
    ],
)
def test_what_does_not_fit_is_refused(nodes, needs, options, words):
    with pytest.raises(ValueError, match=words):
        sizes(nodes, needs, **options)


def test_a_cluster_without_room_for_one_of_each():
    found = sizes(NODES, SMALL)
    check_free([found.base, found.residual], {"CPU": 1, "memory": 2 * GB})
    with pytest.raises(ValueError, match="need 2e\\+09 of memory, but only 1e\\+09 are free"):
        check_free([found.base, found.residual], {"CPU": 1, "memory": GB})


def test_needs_are_those_of_the_models_files(tiny_checkpoint, tiny_video_checkpoint):
    own = needs_of(load_pipeline(tiny_checkpoint, device="cpu"))
    assert own.base > 0 and own.residual > own.base and 0.0 < own.base_share < 0.5
    plain = needs_of(load_pipeline(tiny_video_checkpoint, device="cpu"))
    assert plain.base == 0 and plain.base_share == 0.0
