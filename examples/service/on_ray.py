"""The same app as replicas of Ray Serve, each with a pipe, a GPU and a queue of its own.

    serve run examples.service.on_ray:deployment
    REPLICA_GPUS=0 serve run examples.service.on_ray:deployment  # where there is no GPU: a replica waits for one

Ray Serve sends a request to the replica with the fewest under way, starts more as requests come, and drains those that
it stops. Needs ``pip install 'ray[serve]'``. Limits hold for each replica.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from ray import serve

from examples.service.app import create_app
from examples.service.settings import Settings


def build() -> FastAPI:
    """Return the app of a replica; what the environment says of it is read where it runs."""
    return create_app(Settings.of(os.environ))


@serve.deployment(
    ray_actor_options={"num_gpus": float(os.environ.get("REPLICA_GPUS", "1"))},
    max_ongoing_requests=256,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 16},
    graceful_shutdown_timeout_s=120,
)
@serve.ingress(build)
class Images:
    """A replica: all that it does is in the app."""


deployment = Images.bind()  # type: ignore[attr-defined]  # Ray's decorators have no types
