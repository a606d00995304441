"""The command line interface: `perparam plan | chat | generate | compare | audit | convert | demo`."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from . import (
    Sampling,
    __version__,
    audit,
    checkpoint_tree,
    compare,
    generate,
    get_policy,
    load_model,
    load_tokenizer,
    stream_text,
)
from .chat import Chat, Stopwatch
from .loaders import Checkpoint, convert_checkpoint, open_checkpoint, sampling_defaults
from .loaders.compare import TEXT, check_plot
from .loaders.metrics import divergence
from .loaders.save import shard_sizes
from .models import CausalLM
from .policies import PerparamError
from .policies.errors import InvalidText
from .policies.plan import human_bytes, plan
from .policies.resolved import resolve

_FOLDER = "a folder with config.json and safetensors files"
_CHECKPOINT = f"{_FOLDER}, or the name of a repository on the Hugging Face hub"
_POLICY = "a YAML file, a preset (f32, bf16, fp8_weight_only, fp8_dynamic), a dtype, or params=…,compute=…,output=…"
_SAMPLING = {
    "temperature": (float, "divide the logits by X; 0: take the most likely token"),
    "top-p": (float, "keep the most likely tokens that together have probability X; 1: all"),
    "min-p": (float, "keep tokens at least X times as likely as the most likely one; 0: all"),
    "top-k": (int, "keep the X most likely tokens; 0: all"),
    "repetition-penalty": (float, "penalty for tokens that are in the prompt or the answer; 1: none"),
}
"""Options whose default is the value in generation_config.json."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 after an error, whose message is on stderr."""
    parser = argparse.ArgumentParser(prog="perparam", description="Mixed-precision policies for JAX and Flax.")
    parser.add_argument("--version", action="version", version=f"perparam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if name != "demo":
            sub.add_argument(
                "checkpoint", metavar="CHECKPOINT", help=_FOLDER if name in ("plan", "convert") else _CHECKPOINT
            )
            several = name == "compare"
            action = "append" if several else "store"
            policy_help = f"{_POLICY}; repeat it for each policy" if several else _POLICY
            sub.add_argument("--policy", metavar="POLICY", help=policy_help, action=action, required=several)
        if name in ("chat", "generate"):
            group = sub.add_argument_group("sampling", "The defaults are the values in generation_config.json.")
            for option, (kind, meaning) in _SAMPLING.items():
                group.add_argument(f"--{option}", type=kind, metavar="X", help=meaning)
            group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random numbers; default: 0")
        return sub

    plan_command = command("plan", _plan, "Print the storage and compute format of each parameter; reads no weights.")
    plan_command.add_argument("--json", action="store_true", help="print JSON with one line per row, for diffs")
    plan_command.add_argument(
        "--target", metavar="TARGET", help="add the matmul implementations on a device: here, cpu, cuda, cuda:9.0, …"
    )
    chat_command = command("chat", _chat, "Chat with a model. /help lists commands; Ctrl-C stops an answer.")
    chat_command.add_argument("--system", metavar="TEXT", help="a system message")
    chat_command.add_argument(
        "--no-thinking", action="store_true", help="set enable_thinking=False in the chat template"
    )
    chat_command.add_argument(
        "--max-new-tokens", type=int, default=2048, metavar="N", help="maximum length of an answer; default: 2048"
    )
    generate_command = command("generate", _generate, "Continue a prompt, given as text or token ids.")
    prompt = generate_command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--file", metavar="FILE", help="a file with the prompt; -: standard input")
    prompt.add_argument("--tokens", metavar="1,2,3", type=_ids, help="the prompt as token ids; prints the new ids")
    generate_command.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="default: 20")
    generate_command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a string that ends the answer; may be repeated"
    )
    compare_command = command(
        "compare", _compare, "Compare policies: perplexity, KL to the first policy, memory, speed."
    )
    compare_command.add_argument("--text", metavar="FILE", help="the text to evaluate; default: a paragraph of Darwin")
    compare_command.add_argument("--tokens", metavar="1,2,3", type=_ids, help="token ids instead of a text")
    compare_command.add_argument("--plot", metavar="FILE.png", help="also write a plot of the table; needs matplotlib")
    audit_command = command("audit", _audit, "Print the numerical error of a policy, relative to float32.")
    audit_command.add_argument(
        "--tokens", metavar="1,2,3", type=_ids, help="token ids of the comparison; default: 64 random ids"
    )
    convert_command = command("convert", _convert, "Convert a checkpoint to the storage formats of a policy.")
    convert_command.add_argument("folder", metavar="DST", help="the new folder; an old checkpoint there is replaced")
    convert_command.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="maximum size of a file; default: 5GB"
    )
    convert_command.add_argument(
        "--dry-run", action="store_true", help="print the plan and the file sizes; write nothing"
    )
    demo_command = command(
        "demo", _demo, "Make a small FP8 Qwen3 checkpoint, print its plan, and run it under two policies."
    )
    demo_command.add_argument("--folder", metavar="DIR", help="folder for the checkpoint; default: a temporary folder")
    options = parser.parse_args(arguments)
    if getattr(options, "stop", None) and options.tokens is not None:
        parser.error("--stop needs a prompt as text, not --tokens")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot print × prints a question mark
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"perparam: warning: {message}", file=sys.stderr)
            options.run(options)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (PerparamError, OSError) as error:
        print(f"perparam: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError, AssertionError) as error:  # from JAX: no such device, not enough memory
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"perparam: error: JAX could not run this: {lines[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected token ids such as 1,2,3, found {text!r}") from None


def _plan(arguments: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(arguments.checkpoint)
    table = plan(resolve(get_policy(arguments.policy), checkpoint.tree), arguments.target)
    print(table.to_json() if arguments.json else table, end="" if arguments.json else "\n")
    if not arguments.json:
        _print_left_out(checkpoint)


def _print_left_out(checkpoint: Checkpoint) -> None:
    for reason in dict.fromkeys(checkpoint.left_out.values()):
        names = [name for name, each in checkpoint.left_out.items() if each == reason]
        print(f"left out: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}, since {reason}")


def _convert(arguments: argparse.Namespace) -> None:
    checkpoint, policy = open_checkpoint(arguments.checkpoint), get_policy(arguments.policy)
    resolved = resolve(policy, checkpoint.tree)
    costs = plan(resolved)
    if arguments.dry_run:
        print(costs)
        _print_left_out(checkpoint)
        sizes = shard_sizes(checkpoint, resolved, arguments.max_shard_size)
        files = "1 file" if len(sizes) == 1 else f"{len(sizes)} files, the largest {human_bytes(max(sizes.values()))}"
        print(f"would write {human_bytes(sum(sizes.values()))} to {arguments.folder} in {files}")
        return
    start = time.perf_counter()
    folder = convert_checkpoint(arguments.checkpoint, arguments.folder, policy, max_shard_size=arguments.max_shard_size)
    took = time.perf_counter() - start
    print(f"{folder}: {human_bytes(costs.total_bytes)} from {human_bytes(costs.total_bytes_before)} in {took:.1f} s")


def _sampling(arguments: argparse.Namespace, model: CausalLM) -> Sampling:
    """The sampling that the checkpoint recommends, with the changes of the command line."""
    source = model.config.source
    names = ("temperature", "top_p", "min_p", "top_k", "repetition_penalty")
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    defaults = Sampling(temperature=0.0) if source is None else sampling_defaults(source.parent)
    if defaults.temperature == 0 and "temperature" not in changes and {"top_p", "min_p", "top_k"} & changes.keys():
        changes["temperature"] = 1.0  # these options have no effect on greedy decoding
    return dataclasses.replace(defaults, **changes)


def _generate(arguments: argparse.Namespace) -> None:
    model = load_model(arguments.checkpoint, arguments.policy)
    sampling = _sampling(arguments, model)
    if arguments.tokens is not None:
        tokens = generate(
            model, [arguments.tokens], max_new_tokens=arguments.max_new_tokens, sampling=sampling, key=arguments.seed
        )
        print(",".join(map(str, np.asarray(tokens)[0])))
        return
    text = arguments.prompt
    if arguments.file is not None:
        text = _read(arguments.file)
    tokenizer, watch = load_tokenizer(_folder(model)), Stopwatch()
    pieces = stream_text(
        model, tokenizer, text, arguments.max_new_tokens, stop=arguments.stop, sampling=sampling, key=arguments.seed
    )
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            print(f"\n{watch.summary(end.value)}", file=sys.stderr)
            return
        sys.stdout.write(piece)
        sys.stdout.flush()


def _read(file: str) -> str:
    """The text in a file, or of standard input for `-`."""
    try:
        return sys.stdin.read() if file == "-" else pathlib.Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidText(f"{file}: cannot be read as UTF-8 text: {error}.") from error


def _chat(arguments: argparse.Namespace) -> None:
    model = load_model(arguments.checkpoint, arguments.policy)
    Chat(
        model,
        load_tokenizer(_folder(model)),
        system=arguments.system,
        enable_thinking=False if arguments.no_thinking else None,
        sampling=_sampling(arguments, model),
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    ).run()


def _folder(model: CausalLM) -> pathlib.Path:
    """The folder that a model was loaded from."""
    assert model.config.source is not None
    return model.config.source.parent


def _compare(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None:
        check_plot(arguments.plot)
    tokens = arguments.tokens
    if tokens is None:
        text = TEXT if arguments.text is None else _read(arguments.text)
        tokens = load_tokenizer(arguments.checkpoint).encode(text)
    comparison = compare(arguments.checkpoint, arguments.policy, tokens)
    print(comparison)
    if arguments.plot is not None:
        comparison.plot(arguments.plot)
        print(f"plot written to {arguments.plot}")


def _audit(arguments: argparse.Namespace) -> None:
    model = load_model(arguments.checkpoint)
    tokens = arguments.tokens or np.random.default_rng(0).integers(0, model.config.vocab_size, 64).tolist()
    print(audit(model, arguments.policy, [tokens]))


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.folder is not None:
        return _demo_in(pathlib.Path(arguments.folder))
    with tempfile.TemporaryDirectory(prefix="perparam-demo-") as folder:
        return _demo_in(pathlib.Path(folder))


def _demo_in(folder: pathlib.Path) -> None:
    from .examples.make_checkpoint import make_checkpoint

    text = (pathlib.Path(__file__).parent / "examples" / "policy.yaml").read_text(encoding="utf-8")
    print(f"A small Qwen3 with FP8 kernels and random weights, in Hugging Face layout: {make_checkpoint(folder)}\n")
    print(f"The policy, examples/policy.yaml:\n\n{text}\nIts plan, made from the headers of the checkpoint:\n")
    policy = get_policy(pathlib.Path(__file__).parent / "examples" / "policy.yaml")
    print(policy.explain(checkpoint_tree(folder)))
    prompt = np.arange(1, 17)[None]
    logits = {}
    for name, each in (("the policy", policy), ("f32", "f32")):
        start = time.perf_counter()
        model = load_model(folder, each)
        loaded = time.perf_counter()
        logits[name] = np.asarray(model(prompt)).astype(np.float32)
        tokens = np.asarray(generate(model, prompt, max_new_tokens=12))[0]
        size = human_bytes(get_policy(None).explain(model).total_bytes)
        print(f"\nUnder {name}: {size} of parameters, loaded in {loaded - start:.2f} s")
        print(f"  logits {logits[name].shape}, generated {','.join(map(str, tokens))}")
    under_policy, exact = logits["the policy"], logits["f32"]
    error = np.linalg.norm(under_policy - exact) / np.linalg.norm(exact)
    _, agrees = divergence(jnp.asarray(exact), jnp.asarray(under_policy))
    print(
        f"\nLogits under the policy differ from float32 by {error:.1e} (relative); "
        f"the most likely token is the same for {float(agrees.mean()):.0%} of tokens."
    )
    print(
        "\nTo keep the checkpoint, run `perparam demo --folder DIR`, then try `perparam plan DIR`, `perparam chat DIR` "
        "and `perparam compare DIR --policy f32 --policy bf16`."
    )


if __name__ == "__main__":
    sys.exit(main())
