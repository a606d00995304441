"""Several processes of `jax.distributed` on this machine, for tests: started together, and ended whatever happens."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).parent


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def started(command, count, devices=1):
    """`count` processes of a command, which reads its place from PROCESS, PROCESSES and COORDINATOR.

    Each has a file `output` of what it printed. All are killed at the end.
    """
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": flags, "PROCESSES": str(count),
        "COORDINATOR": f"localhost:{free_port()}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    running = []
    with contextlib.ExitStack() as stack:
        try:
            for process in range(count):
                output = stack.enter_context(tempfile.TemporaryFile("w+"))
                environment["PROCESS"] = str(process)
                one = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=output)
                one.output = output
                running.append(one)
            yield running
        finally:
            for one in running:
                one.kill()
                one.wait()


def printed(process) -> str:
    """What a process printed so far."""
    process.output.seek(0)
    return process.output.read()


def run_together(command, count, devices=1, seconds=600) -> list[str]:
    """What each process printed; fails as soon as one of them fails, or after `seconds`."""
    until = time.monotonic() + seconds
    with started(command, count, devices) as processes:
        while (codes := [one.poll() for one in processes]) != [0] * count:
            if any(codes) or time.monotonic() > until:
                time.sleep(1)  # for what the others have to say
                texts = [f"process {i}, {one.poll()}: {printed(one)[-3000:]}" for i, one in enumerate(processes)]
                raise AssertionError("\n".join(texts))
            time.sleep(0.05)
        return list(map(printed, processes))


def python(program, *arguments):
    """The command of a Python program among the tests."""
    return [sys.executable, "-W", "error", TESTS / program, *arguments]
