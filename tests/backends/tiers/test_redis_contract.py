"""The contract against real servers: one, and a cluster whose replicas must acknowledge."""

import pytest
from hypothesis.stateful import run_state_machine_as_test

from tmem.backends.tiers.contract import Tier, TierIdentity
from tmem.backends.tiers.redis_tier import RedisTier
from tmem.backends.tiers.redis_url import RedisAddress

from ..machine import bounded
from .contract import TierContract
from .machine import TierMachine
from .servers import Cluster, Server


class RedisWorld:
    """What is stored at `url`."""

    capacity_records = 0

    def __init__(self, url: str) -> None:
        self.address = RedisAddress.parse(url)

    def open(self, identity: TierIdentity, writer: bool) -> Tier:
        return RedisTier(self.address, identity, writer)


class TestOneServer(TierContract):
    @pytest.fixture
    def world(self, redis_server: Server) -> RedisWorld:
        redis_server.ask("FLUSHALL")
        return RedisWorld(f"redis://{redis_server.address}/0?replicas=0")


class TestCluster(TierContract):
    @pytest.fixture
    def world(self, redis_cluster: Cluster) -> RedisWorld:
        return RedisWorld(redis_cluster.url)


def test_random_use(redis_server: Server) -> None:
    class Machine(TierMachine):
        def new_world(self) -> RedisWorld:
            redis_server.ask("FLUSHALL")
            return RedisWorld(f"redis://{redis_server.address}/0?replicas=0")

    run_state_machine_as_test(Machine, settings=bounded(20, 30))


def test_random_use_of_a_cluster(redis_cluster: Cluster) -> None:
    class Machine(TierMachine):
        def new_world(self) -> RedisWorld:
            for server in redis_cluster.primaries():
                server.ask("FLUSHALL")
            return RedisWorld(redis_cluster.url)

    run_state_machine_as_test(Machine, settings=bounded(6, 25))
