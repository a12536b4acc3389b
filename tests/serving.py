"""serving.py - a `convoke serve` of one's own for a test: started, spoken to by gRPC, ended, and looked after for what it leaves.

Needs python3-grpcio and python3-protobuf; the messages' classes are made from proto/*.proto at test time.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid

import grpc

SOURCE = os.environ.get("CONVOKE_SOURCE_DIR", os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINARY = os.environ.get("CONVOKE_BINARY_DIR", os.path.join(SOURCE, "build"))
DEMO = os.path.join(SOURCE, "deploy/models/convoke-demo")
READY = re.compile(r"^ready: grpc (\S+), model (\S+), (\d+) ranks, plan (\S+), (\d+) sequences, (\d+) KV tokens(?:, http (\S+))?$")
SLOW = float(os.environ.get("CONVOKE_TEST_PATIENCE", "1"))  # sanitizers need more time


def message_classes(folder):
    """vllm_pb2 and convoke_pb2, made into folder."""
    protos = ["proto/vllm.proto", "proto/convoke.proto"]
    subprocess.run(["protoc", "-I", os.path.join(SOURCE, "proto"), "-I", SOURCE, "--python_out", folder] + protos, cwd=SOURCE, check=True)
    sys.path.insert(0, folder)
    from proto import convoke_pb2, vllm_pb2  # pylint: disable=import-error,import-outside-toplevel

    return vllm_pb2, convoke_pb2


def marked_processes(mark):
    """Pids of living processes that carry our mark in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as f:
                marked = mark.encode() in f.read()
            with open(f"/proc/{pid}/stat") as f:
                state = f.read().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if marked and state not in "ZX" and int(pid) != os.getpid():
            found.append(int(pid))
    return sorted(found)


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return f.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def rank_of(pid):
    """Its MPI rank, or None."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as f:
            match = re.search(rb"OMPI_COMM_WORLD_RANK=(\d+)", f.read())
    except OSError:
        return None
    return int(match.group(1)) if match else None


class Server:
    """One server with a folder of its own; `with Server(...) as s:` ends it and checks that nothing is left."""

    def __init__(self, *options, model=DEMO, ranks=2, environment=None, ready=True):
        self.folder = tempfile.mkdtemp(prefix="convoke-test-")
        self.mark = "CONVOKE_TEST_MARK=" + uuid.uuid4().hex
        self.tmp = os.path.join(self.folder, "tmp")
        os.mkdir(self.tmp)
        self.pids = []
        self.arguments = [os.path.join(BINARY, "convoke"), "serve", "--model", model, "--ranks", str(ranks), "--grpc", "127.0.0.1:0",
                          "--threads", "1", *options]
        self.environment = dict(os.environ, TMPDIR=self.tmp, OMPI_MCA_rmaps_base_oversubscribe="1", **(environment or {}))
        name, value = self.mark.split("=")
        self.environment[name] = value
        self.log_path = os.path.join(self.folder, "log")
        self.process = None
        self.channel = None
        self.http = None
        if ready:
            self.start()

    def start(self, patience=60):
        """Starts it (again) and waits for its ready line."""
        self.log = open(self.log_path, "ab")
        self.process = subprocess.Popen(self.arguments, env=self.environment, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.pids.append(self.process.pid)
        timer = threading.Timer(patience * SLOW, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        match = READY.match(line.strip())
        if not match:
            raise AssertionError(f"no ready line but {line!r}; the log:\n{self.said()}")
        self.address, self.http = match.group(1), match.group(7)
        self.ranks, self.kv_tokens = int(match.group(3)), int(match.group(6))
        self.connect()
        return self

    def connect(self):
        if self.channel:
            self.channel.close()
        self.channel = grpc.insecure_channel(self.address, options=[("grpc.max_receive_message_length", 1 << 28)])

    def call(self, path, request, response_class, timeout=60, **more):
        method = self.channel.unary_unary(path, request_serializer=type(request).SerializeToString, response_deserializer=response_class.FromString)
        return method(request, timeout=timeout * SLOW, **more)

    def stream(self, path, request, response_class, timeout=120, **more):
        method = self.channel.unary_stream(path, request_serializer=type(request).SerializeToString, response_deserializer=response_class.FromString)
        return method(request, timeout=timeout * SLOW, **more)

    def said(self):
        with open(self.log_path, errors="replace") as f:
            return f.read()

    def workers(self):
        """{rank: pid} of the living workers."""
        found = {}
        for pid in marked_processes(self.mark):
            rank = rank_of(pid)
            if rank is not None and "convoke-worker" in command_line(pid).split(" ")[0]:
                found[rank] = pid
        return found

    def mpirun(self):
        for pid in marked_processes(self.mark):
            word = command_line(pid).split(" ")[0]
            if os.path.basename(word) in ("mpirun", "orterun", "mpiexec"):
                return pid
        return None

    def stop(self, expected=0, patience=30):
        """SIGTERM; then nothing of it may be left."""
        if self.channel:
            self.channel.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(patience * SLOW)
        if expected is not None and code != expected:
            raise AssertionError(f"exit code {code} instead of {expected}; the log:\n{self.said()}")
        self.nothing_left()

    def nothing_left(self, patience=5):
        until = time.monotonic() + patience * SLOW
        while True:
            left = [f"process {p}: {command_line(p)}" for p in marked_processes(self.mark)]
            # A launch keeps its shared memory in a folder named by the coordinator's pid; other tests may run beside this one.
            left += [f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if any(f"-{pid}-" in name for pid in self.pids)]
            left += [os.path.join(self.tmp, name) for name in os.listdir(self.tmp)]
            if not left:
                return
            if time.monotonic() > until:
                raise AssertionError("left behind: " + "; ".join(left) + f"\nthe log:\n{self.said()}")
            time.sleep(0.05)

    def nothing_left_of_workers(self, patience=10):
        """After the coordinator was killed its workers must end by themselves."""
        until = time.monotonic() + patience * SLOW
        while self.workers() or self.mpirun():
            if time.monotonic() > until:
                raise AssertionError(f"still there: {[command_line(p) for p in marked_processes(self.mark)]}")
            time.sleep(0.05)

    def destroy(self):
        """Whatever still lives is killed: also after a failed test nothing runs on."""
        if self.channel:
            self.channel.close()
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in marked_processes(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        try:
            if kind is None and self.process:
                self.stop()
            elif kind is not None:
                sys.stderr.write("the server's log:\n" + self.said()[-6000:] + "\n")
        finally:
            self.destroy()
