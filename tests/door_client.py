"""door_client.py - what the Python tests of the gRPC door share: modules made from our own .proto files, a server to talk to, short names
for its methods."""

import os
import subprocess
import sys
import tempfile

import grpc

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_modules = tempfile.TemporaryDirectory(prefix="convoke-proto-")


def load_messages():
    """protoc's Python modules for the served .proto files, made now: nothing generated is kept in the repository."""
    names = ["vllm", "convoke", "health", "reflection", "reflection_v1alpha", "smg_common", "vllm_engine"]
    command = ["protoc", "-I" + SOURCE, "-I" + SOURCE + "/proto", "--python_out=" + _modules.name]
    subprocess.run(command + [f"{SOURCE}/proto/{name}.proto" for name in names], check=True)
    sys.path.insert(0, _modules.name)
    import importlib
    return [importlib.import_module(f"proto.{name}_pb2") for name in names]


class Fake:
    """tests/door_fake: the door over a scripted model."""

    def __init__(self, program, **options):
        arguments = [f"{key}={value}" for key, value in options.items()]
        self.process = subprocess.Popen([program] + arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline().split()[1])
        self.address = f"127.0.0.1:{self.port}"

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, line):
        self.tell(line)
        return self.process.stdout.readline().strip()

    def stop(self, line="quit"):
        if self.process.poll() is None:
            try:
                self.tell(line)
            except BrokenPipeError:
                pass
        code = self.process.wait(30)
        self.process.stdin.close()
        self.process.stdout.close()
        return code


class Client:
    """A channel and its methods: client.unary(path, Request, Response)(request, timeout=..)."""

    def __init__(self, address, credentials=None, options=()):
        options = [("grpc.use_local_subchannel_pool", 1), *options]
        if credentials:
            self.channel = grpc.secure_channel(address, credentials, options)
        else:
            self.channel = grpc.insecure_channel(address, options)

    def unary(self, path, request, response):
        return self.channel.unary_unary(path, request_serializer=request.SerializeToString, response_deserializer=response.FromString)

    def stream(self, path, request, response):
        return self.channel.unary_stream(path, request_serializer=request.SerializeToString, response_deserializer=response.FromString)

    def both(self, path, request, response):
        return self.channel.stream_stream(path, request_serializer=request.SerializeToString, response_deserializer=response.FromString)

    def raw(self, path):
        return self.channel.unary_unary(path)

    def close(self):
        self.channel.close()
