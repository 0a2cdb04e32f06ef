"""A Dask scheduler that is there already."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.errors import EngineError
from connectomics.io import store

if TYPE_CHECKING:
    from distributed import Client

_CONNECT_S = 10.0  # a scheduler answers within that, or is taken for unreachable


def client_of(given: str) -> Client:
    """A client of a scheduler by its address or its file; `EngineError` if none answers there."""
    from distributed import Client

    remedy = "start one with `dask scheduler`, or leave engine.address out"
    file, address = Path(given), given
    if "://" not in given and (file.suffix == ".json" or os.sep in given):
        content = store.read_json(file)
        if content is None:
            raise EngineError(f"engine.address: there is no scheduler file {given}; {remedy}")
        address = str(content.get("address"))
    try:
        with ThreadPoolExecutor(1) as thread:  # a loop of its own, also if one runs here (in a notebook)
            kind = thread.submit(asyncio.run, _kind(address)).result()
    except Exception as error:  # of whatever answers there
        raise EngineError(
            f"engine.address: no Dask scheduler answers at {given} (waited up to {_CONNECT_S:g} s); {remedy}"
        ) from error
    if kind != "Scheduler":
        raise EngineError(f"engine.address: {given} is a Dask {kind}, expected a scheduler; {remedy}")
    return Client(address, timeout=_CONNECT_S, set_as_default=False)


async def _kind(address: str) -> str:
    """What answers at an address, as Dask calls it. A client itself would wait without end for one that says nothing,
    and try to make sense of what another server says."""
    from distributed.core import rpc
    from distributed.security import Security

    async def ask() -> str:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as server:
            return str((await server.identity())["type"])

    return await asyncio.wait_for(ask(), _CONNECT_S)
