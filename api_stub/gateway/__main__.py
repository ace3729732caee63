"""`python -m api_stub.gateway`: the gateway with the environment's settings."""

from __future__ import annotations

import sys

from api_stub.errors import InvalidSettings
from api_stub.gateway.server import serve
from api_stub.settings import GatewaySettings

if __name__ == "__main__":
    try:
        serve(GatewaySettings.load())
    except InvalidSettings as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        raise SystemExit(78) from error
