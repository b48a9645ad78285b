"""`serve --ray`: the engines of a server on a Ray cluster. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..cluster.connect import LOCAL, connected, free, nodes
from ..cluster.model import Model
from ..cluster.needs import probed
from ..cluster.serving import RayWorkers
from ..cluster.sizes import check_free, engines
from ..serving.store import Store
from .streams import only_results


@contextmanager
def on_ray(settings: argparse.Namespace, store: Store, **told: Any) -> Iterator[RayWorkers]:
    """The engines, not started yet, while this process is connected to their cluster.

    told: keep and on_event of `RayWorkers`

    Raises ValueError for an address without a cluster, and for one that cannot hold them.
    """
    with only_results(), connected(settings.ray):
        machines = nodes()
        device, dtype, memory = probed(machines, settings.device, settings.dtype, here=False)
        kind = engines(machines, settings.workers, memory is not None)
        check_free([kind], free())
        capture = not settings.no_capture
        files = (settings.model, settings.base_unet, settings.lora)
        model = Model.of(*files, device, dtype, capture)
        sent = model.sent() if len(machines) > 1 else {}
        told |= {"name": settings.served_model_name, "batch_size": settings.batch_size}
        yield RayWorkers(store, model, kind, sent=sent, leaves=settings.ray != LOCAL, **told)
