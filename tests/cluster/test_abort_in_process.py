"""A client may reach another front end with its abort than with its request."""

from __future__ import annotations

from tests.cluster.harness import running_cluster, second_gateway


async def test_a_request_is_aborted_through_any_front_end() -> None:
    async with running_cluster() as cluster:
        assert cluster.gateway is not None
        aborted: list[str] = []
        async with second_gateway(cluster) as other:
            with other.running.entered("far", lambda: aborted.append("far")):
                assert await cluster.gateway.abort("far") and await other.abort("far")
                assert not await cluster.gateway.abort("elsewhere")
            assert not await cluster.gateway.abort("far")
        assert aborted == ["far", "far"]
