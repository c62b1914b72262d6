#!/usr/bin/env bash
# grpcio 1.85.1: a new channel to a server that listens waits out the pause of an older channel to the same address.
#
# Expected: the growing pause between attempts to connect belongs to the channel that failed; a channel made after the
#           server is back connects at once.
# Seen:     while an older channel that saw the outage is open, a new one waits with it, here up to more than ten seconds
#           after an outage of half a minute (by default the pause grows to two minutes); a new one that has
#           grpc.use_local_subchannel_pool connects within milliseconds, to the same server at the same moment.
# So:       making the client anew does not help a process that must go on at once; the pause is capped by
#           grpc.max_reconnect_backoff_ms, or the pool is made the channel's own.
#
# Run it: it installs the package into a temporary folder, prints what it saw, and fails when that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet grpcio==1.85.1
"$folder/venv/bin/python" - <<'PYTHON'
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import grpc


def seconds_until_ready(port, *options):
    began = time.monotonic()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        grpc.channel_ready_future(channel).result(timeout=150)
    return time.monotonic() - began


def outage(seconds):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as older:
        older.subscribe(lambda state: None, try_to_connect=True)
        time.sleep(seconds)
        server = grpc.server(ThreadPoolExecutor(1))
        server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        own_pool = seconds_until_ready(port, ("grpc.use_local_subchannel_pool", 1))
        shared_pool = seconds_until_ready(port)
        server.stop(None)
    return own_pool, shared_pool


with ThreadPoolExecutor(3) as threads:
    waits = list(threads.map(outage, (24, 31, 38)))
own_pool, shared_pool = (max(found) for found in zip(*waits))
print(f"a new channel waited up to {shared_pool:.1f} s, one with a pool of its own up to {own_pool:.1f} s")
assert own_pool < 1.5 and shared_pool > 4, "grpcio behaves otherwise now"
PYTHON
