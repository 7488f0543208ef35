"""benchmarks/fleet_plan.py against what queues and caches are known to do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("fleet_plan", BENCHMARKS / "fleet_plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fleet_plan", module)  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def test_one_replica_is_as_cold_as_an_lru_cache_is_known_to_be(plan):
    """Che's approximation: an adapter is there if it was asked for in the last T seconds, and T is
    such that as many are as have room."""
    capacity = 100
    traffic = plan.Traffic(1_000, 0.9, 1.0, 60_000, 1, 0.0)
    costs = plan.Costs(0.0, 0.0, 0.0, 0.0, 1.0)
    found = plan.simulate(costs, traffic, 1, capacity, plan.round_robin).cold.mean()
    shares = traffic.popularity()
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        full = (1 - np.exp(-shares * middle)).sum() > capacity
        low, high = (low, middle) if full else (middle, high)
    assert found == pytest.approx((shares * np.exp(-shares * low)).sum(), abs=0.01)


def test_the_wait_is_that_of_a_queue_with_one_server(plan):
    """Pollaczek and Khinchine: rate * E[S^2] / 2 (1 - rate * E[S]); answers' length is random."""
    tokens, token_s, prompt_s, rate = 20.0, 0.01, 0.1, 2.0
    traffic = plan.Traffic(1, 1.0, rate, 200_000, tokens, 0.0)
    costs = plan.Costs(0.0, prompt_s, token_s, 0.0, 1.0)
    found = plan.simulate(costs, traffic, 1, 1, plan.round_robin).first_token_s.mean() - prompt_s
    mean = prompt_s + tokens * token_s
    variance = token_s**2 * (1 - 1 / tokens) * tokens**2  # of a geometric length
    wanted = rate * (mean**2 + variance) / (2 * (1 - rate * mean))
    assert found == pytest.approx(wanted, rel=0.05)


def test_routers_that_know_adapters_load_less_and_all_serve_all(plan):
    traffic = plan.Traffic(300, 1.0, 20.0, 10_000, 10, 0.2)
    costs = plan.Costs(0.2, 0.05, 0.01, 0.2, 1.0)
    cold = {
        policy.__name__: plan.simulate(costs, traffic, 10, 30, policy).cold.mean()
        for policy in plan.POLICIES
    }
    assert cold["lora_aware"] < cold["round_robin"] / 2
    assert cold["hashing"] < cold["round_robin"] / 2


def test_hashing_gives_nobody_more_than_its_bound(plan):
    fleet = plan.Fleet(4, 10)
    costs = plan.Costs(0.0, 1.0, 0.0, 0.0, 1.0)
    choose = plan.hashing(fleet, costs, 1.0)
    for _ in range(40):  # all for one adapter, at once
        fleet.serve(choose(7), 0.0, 7, 0, costs)
    assert fleet.in_flight.max() <= plan.BOUND * 40 / 4 + 1
    fleet.pass_time(1e9)
    assert choose(7) == fleet.around(7)[0]
