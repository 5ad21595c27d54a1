"""Timesteps that the pipeline reads on the host are kept there; what the scheduler steps by stays where it was."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import ernie_accel
from ernie_accel import KeepTimestepsOnHost, SwapScheduler
from ernie_accel.core.context import Context
from ernie_accel.samplers.solvers import SCHEDULERS
from ernie_accel.transforms.scheduler.keep_timesteps_on_host import _OnHost
from tests.examples import differences, snapshot
from tests.pipelines import picture

H200 = Context.named("h200")  # on the CPU there is nothing to do


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device, so that a machine without one can tell who moves it."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.fixture
def on_a_device(ernie):
    """A pipe whose scheduler makes its timesteps and sigmas on "another device"."""
    scheduler = ernie.scheduler
    stock = scheduler.set_timesteps

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        stock(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        scheduler.timesteps = scheduler.timesteps.as_subclass(Elsewhere)
        scheduler.sigmas = scheduler.sigmas.as_subclass(Elsewhere)

    scheduler.set_timesteps = set_timesteps
    return ernie


def test_timesteps_come_to_the_host_and_sigmas_do_not(on_a_device):
    ernie_accel.optimize(on_a_device, KeepTimestepsOnHost(), context=H200)
    on_a_device.scheduler.set_timesteps(4)
    assert type(on_a_device.scheduler.timesteps) is torch.Tensor
    assert type(on_a_device.scheduler.sigmas) is Elsewhere  # a scalar on the host would step latents by other bits
    ernie_accel.restore(on_a_device)
    on_a_device.scheduler.set_timesteps(4)
    assert type(on_a_device.scheduler.timesteps) is Elsewhere


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_steps_as_before(ernie, name):
    ernie_accel.optimize(ernie, SwapScheduler(name))
    before = picture(ernie, steps=4)
    ernie_accel.optimize(ernie, KeepTimestepsOnHost(), SwapScheduler(name), context=H200)
    assert isinstance(ernie.scheduler.set_timesteps, _OnHost)
    assert torch.equal(picture(ernie, steps=4), before)


def test_pipelines_still_see_what_the_scheduler_takes(ernie):
    before = inspect.signature(ernie.scheduler.set_timesteps)
    ernie_accel.optimize(ernie, KeepTimestepsOnHost(), context=H200)
    assert inspect.signature(ernie.scheduler.set_timesteps) == before


def test_a_copy_of_the_scheduler_keeps_its_own(ernie):
    ernie_accel.optimize(ernie, KeepTimestepsOnHost(), context=H200)
    other = copy.deepcopy(ernie.scheduler)
    other.set_timesteps(4)
    assert len(other.timesteps) == 4
    assert ernie.scheduler.timesteps is None or len(ernie.scheduler.timesteps) != 4


def test_other_pipelines_are_left_alone_and_told_so(flux):
    assert KeepTimestepsOnHost().preview(flux, H200).changes == ()
    plan = ernie_accel.plan(flux, KeepTimestepsOnHost(), context=H200)
    assert "FluxPipeline is not known to read them on the host" in str(plan)


def test_on_the_cpu_there_is_nothing_to_do_until_the_pipe_is_elsewhere(ernie):
    before = snapshot(ernie)
    ernie_accel.optimize(ernie, KeepTimestepsOnHost())
    (entry,) = ernie_accel.report(ernie).entries
    assert entry.status == "nothing to do"
    assert "set_timesteps" not in vars(ernie.scheduler)
    ernie_accel.optimize(ernie, KeepTimestepsOnHost(), context=H200)  # the same request, on another machine
    assert "set_timesteps" in vars(ernie.scheduler)
    ernie_accel.restore(ernie)
    assert "set_timesteps" not in vars(ernie.scheduler)
    assert differences(before, snapshot(ernie)) == []


@pytest.mark.parametrize("last", [SwapScheduler("unipc"), SwapScheduler("heun")])
def test_whatever_scheduler_comes_and_goes_only_the_one_in_place_is_wrapped(ernie, last):
    own, keep = ernie.scheduler, KeepTimestepsOnHost()
    for request in ((keep,), (keep, last), (last,), (last, keep), (keep,), (keep,)):
        ernie_accel.optimize(ernie, *request, context=H200)
        assert isinstance(ernie.scheduler.set_timesteps, _OnHost) == (keep in request)
    ernie_accel.restore(ernie)
    assert ernie.scheduler is own
    assert "set_timesteps" not in vars(own)
