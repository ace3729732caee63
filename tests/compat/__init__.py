"""The last release beside this one, on one Redis: producers, gateways, ledgers and reapers of both, in every pairing.

`visionq-0.1.0-py3-none-any.whl` is the producer side of release 0.1.0 (commit 8706aaf), with its Lua scripts and static
files, without its worker. A release replaces it. It was made so, in an empty folder:

    git -C $CLONE archive 8706aaf api_stub pyproject.toml README.md LICENSE | tar x
    sed -i 's/, "worker\\*"\\]/]/; /^worker = \\["demo_model/d; /^visionq-worker = /d' pyproject.toml
    SOURCE_DATE_EPOCH=1795270892 pip wheel --no-deps .

`recorded.json` is what its worker left in Redis; `record.py` makes it. CONTRIBUTING.md says when.

`redis-users-0.1.0.conf` is that release's api_stub/deploy/redis-users.conf, which operators have copied.
"""
