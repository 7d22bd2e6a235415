"""Waypoints' objects in a real directory: made, mended, never taken over, removed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from istiod_lite.waypoint_writer import WaypointWriter
from istiod_lite.waypoints import WaypointSettings
from mesh.cluster.api import Ref
from mesh.cluster.directory import DirectoryCluster
from tests.support.gateways import gateway, service

DEPLOYMENT, SERVICE = Ref("Deployment", "shop", "wp"), Ref("Service", "shop", "wp")
ACCOUNT = Ref("ServiceAccount", "shop", "wp")


@asynccontextmanager
async def writing(path):
    cluster = DirectoryCluster(path, writable=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(WaypointWriter(WaypointSettings()).run, cluster)
        yield cluster
        nursery.cancel_scope.cancel()


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(30):
        while not await check():
            await trio.sleep(0.02)


def exists(cluster, ref, expected=True):
    async def check() -> bool:
        return (await cluster.get(ref) is not None) is expected

    return check


async def test_made_mended_and_removed(tmp_path):
    async with writing(tmp_path) as cluster:
        await cluster.apply(gateway())
        for ref in (ACCOUNT, SERVICE, DEPLOYMENT):
            await until(exists(cluster, ref))
        await cluster.patch(SERVICE, {"spec": {"selector": None, "clusterIP": "10.96.0.7"}})

        async def is_mended() -> bool:
            found = await cluster.get(SERVICE)
            return found is not None and bool(found["spec"].get("selector"))

        await until(is_mended)
        mended = await cluster.get(SERVICE)
        assert mended is not None
        assert mended["spec"]["clusterIP"] == "10.96.0.7"
        await cluster.delete(DEPLOYMENT)
        await until(exists(cluster, DEPLOYMENT))
        await cluster.delete(Ref("Gateway", "shop", "wp"))
        for ref in (ACCOUNT, SERVICE, DEPLOYMENT):
            await until(exists(cluster, ref, False))


async def test_what_is_somebody_elses_stays_as_it_is(tmp_path):
    async with writing(tmp_path) as cluster:
        theirs = service("wp")
        await cluster.apply(theirs)
        await cluster.apply(gateway())
        await until(exists(cluster, DEPLOYMENT))
        assert await cluster.get(SERVICE) == theirs
        await cluster.delete(Ref("Gateway", "shop", "wp"))
        await until(exists(cluster, DEPLOYMENT, False))
        assert await cluster.get(SERVICE) == theirs
        # When the name is free again, it is made.
        await cluster.apply(gateway())
        await cluster.delete(SERVICE)
        await until(exists(cluster, SERVICE))


async def test_a_gateway_that_nobody_can_read_takes_nothing_down(tmp_path):
    async with writing(tmp_path) as cluster:
        await cluster.apply(gateway())
        await until(exists(cluster, DEPLOYMENT))
    await cluster.apply(gateway(allowed={"from": "Nobody knows"}))
    await cluster.delete(ACCOUNT)
    async with writing(tmp_path) as cluster:
        await cluster.apply(gateway("other"))
        await until(exists(cluster, Ref("Deployment", "shop", "other")))
        assert await cluster.get(DEPLOYMENT) is not None


async def test_who_insists_is_not_fought_for_ever(tmp_path):
    cluster = DirectoryCluster(tmp_path, writable=True)
    told, rounds = [], 0
    writer = WaypointWriter(WaypointSettings(), on_contest=lambda: told.append(writer.contested))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run, cluster)
        await cluster.apply(gateway())
        await until(exists(cluster, DEPLOYMENT))

        async def account() -> str:
            found = await cluster.get(DEPLOYMENT)
            assert found is not None
            return found["spec"]["template"]["spec"]["serviceAccountName"]

        with trio.fail_after(30):
            while not told:
                if await account() == "wp":
                    # Another each time: what is seen twice alike is no news in a directory.
                    rounds += 1
                    name = f"theirs-{rounds}"
                    drifted = {"spec": {"template": {"spec": {"serviceAccountName": name}}}}
                    await cluster.patch(DEPLOYMENT, drifted)
                await trio.sleep(0.02)
        assert "Deployment shop/wp is changed again and again" in (
            told[0][Ref("Gateway", "shop", "wp")].message
        )
        assert await account() == f"theirs-{rounds}"
        nursery.cancel_scope.cancel()
