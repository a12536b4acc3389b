#!/usr/bin/env python3
"""with_server.py COMMAND... - runs a command against a `convoke serve` of the bundled model; every word ADDRESS in it becomes the server's."""
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serving  # noqa: E402


def main():
    with serving.Server("--no-log-requests", ranks=2) as server:
        command = [server.address if word == "ADDRESS" else word for word in sys.argv[1:]]
        code = subprocess.run(command, check=False).returncode
        assert server.process.poll() is None, "the server ended"
    sys.exit(code)


if __name__ == "__main__":
    main()
