"""Loads a model that several processes share, generates with it, and saves it, each process its part.

Slurm, one process for each GPU; JAX takes addresses and numbers from Slurm's variables:

    srun --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 python -m perparam.examples.multihost CHECKPOINT SAVED

By ssh, or in two terminals on one machine: the same line in each, with the number of the process. The coordinator is an
address of process 0 that the others reach:

    ssh one python -m perparam.examples.multihost CHECKPOINT SAVED --coordinator one:12345 --processes 2 --process 0
    ssh two python -m perparam.examples.multihost CHECKPOINT SAVED --coordinator one:12345 --processes 2 --process 1

CHECKPOINT and SAVED are folders on a file system that all machines share. If a process dies, JAX ends the others within
about the seconds of `--timeout`, with an exit status that is not zero.
"""

from __future__ import annotations

import argparse

import jax

import perparam


def main() -> None:
    """Runs this process's part; process 0 prints the tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    parser.add_argument("saved", help="folder to save the model in")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0; not needed on Slurm")
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--process", type=int, help="number of this process, from 0")
    parser.add_argument("--timeout", type=int, default=30, help="seconds after which a silent process counts as dead")
    arguments = parser.parse_args()
    jax.distributed.initialize(
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        heartbeat_timeout_seconds=arguments.timeout,
        # A process that ends by an exception waits this long for the others, which wait for it. By default 300 s.
        shutdown_timeout_seconds=arguments.timeout,
    )
    # All processes run the same lines with the same arguments.
    mesh = jax.make_mesh((jax.device_count(),), ("model",))
    model = perparam.load_model(arguments.checkpoint, sharding=mesh)
    arrays = perparam.policies.parameters(model).values()
    held = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    print(f"process {jax.process_index()} of {jax.process_count()} holds {held:,} bytes", flush=True)
    tokens = perparam.generate(model, [[1, 2, 3, 4]], max_new_tokens=8)
    if jax.process_index() == 0:
        print("tokens", tokens.tolist())
    perparam.save_model(model, arguments.saved)


if __name__ == "__main__":
    main()
