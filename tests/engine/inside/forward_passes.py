"""Listens to forward-pass metrics as Dynamo does, and decodes them with its own code.

    ENGINE_PYTHON tests/engine/inside/forward_passes.py PORT SOURCE_FILE COUNT

prints the first COUNT messages of steps as JSON lines, each with the number of its frame.
"""

import importlib.util
import json
import sys

import msgspec
import zmq


def main(port: int, source: str, count: int) -> None:
    """Subscribe, decode, print."""
    spec = importlib.util.spec_from_file_location("forward_pass_metrics", source)
    dynamo = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = dynamo
    spec.loader.exec_module(dynamo)
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.connect(f"tcp://127.0.0.1:{port}")
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.setsockopt(zmq.RCVTIMEO, 120_000)
    print("listening", flush=True)
    while count:
        topic, number, payload = socket.recv_multipart()
        message = dynamo.decode(payload)
        if message.wall_time == 0.0:
            print("idle", flush=True)
            continue
        told = msgspec.to_builtins(message)
        print(json.dumps(told | {"topic": topic.decode(), "frame": int.from_bytes(number, "big")}), flush=True)
        count -= 1


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
