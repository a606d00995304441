"""Trains the small Qwen3 of `perparam demo` on the King James Bible, in a quarter of an hour on two CPU cores.

    python -m perparam.examples.train_tiny FOLDER [--text FILE] [--steps N] [--plot FILE.png]

FOLDER receives the checkpoint in bfloat16, its tokenizer, the excerpt on which `perparam demo` compares policies,
history.json and a model card. The text is downloaded with apt-get (`tiny_text`), or read from FILE, and then there is
no card. The last 4 % of the text are never trained on; the bits that the model needs for each of their bytes are
printed beside those of an n-gram model of the same training text (`kneser_ney`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import perparam
from perparam.examples import tiny_card, tiny_text
from perparam.examples.kneser_ney import KneserNey

CONFIG = perparam.models.Qwen3Config(
    vocab_size=1792,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    eos_token_id=(tiny_text.END,),
    pad_token_id=tiny_text.END,
)
"""1.9 million parameters; 128 divides the sides of all kernels, so that FP8 blocks are whole."""

POLICY = perparam.Policy("bf16", "f32", "f32", master="f32", opt_state={"mu": "bf16", "nu": "f32"})
"""Parameters and first moments are stored in bfloat16, beside float32 masters. Arithmetic is in float32, which was
twice as fast as in bfloat16 on a CPU without AMX."""

LENGTH = 256
"""Tokens of a training row. The saved model sees as many, whatever the length of a text: its attention has a window."""

EXCERPT = 8000
"""Characters of the held-out text in the checkpoint's folder, at most."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the model is trained.

    steps          optimizer steps; the learning rates rise over the first twentieth, then fall linearly to 0
    batch          rows of a step
    muon           peak learning rate of kernels, whose optimizer is Muon
    adam           peak learning rate of embeddings and norms, whose optimizer is Adam
    weight_decay   of kernels
    """

    steps: int = 1500
    batch: int = 8
    muon: float = 0.02
    adam: float = 0.004
    weight_decay: float = 0.1


@dataclasses.dataclass
class History:
    """What was measured during a training.

    losses      training loss of each step, in bits per token
    validation  (step, bits per byte) of the validation part
    seconds     time that the steps took, compilation included
    cpu         the same in seconds of CPU time, which other programs on the machine change less
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) for kernels, and Adam for embeddings and norms."""
    warmup = max(recipe.steps // 20, 1)

    def rate(peak: float) -> optax.Schedule:
        falling = optax.linear_schedule(peak, 0.0, recipe.steps - warmup)
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), falling], [warmup])

    def dimensions(params: Any) -> Any:
        def of(path: tuple[Any, ...], _: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            # A kernel is stored (out, in).
            return optax.contrib.MuonDimensionNumbers(1, 0) if "kernel" in jax.tree_util.keystr(path) else None

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.muon(
        rate(recipe.muon),
        weight_decay=recipe.weight_decay,
        adam_b2=0.95,
        adam_learning_rate=rate(recipe.adam),
        muon_weight_dimension_numbers=dimensions,
    )


def batches(tokens: np.ndarray, rows: int, length: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Endless batches (rows, length + 1) of consecutive tokens; every epoch cuts the text elsewhere, and shuffles."""
    rng = np.random.default_rng(seed)
    while True:
        first = rng.integers(length)
        starts = first + length * rng.permutation((len(tokens) - first - 1) // length)
        for i in range(0, len(starts) - rows + 1, rows):
            yield tokens[starts[i : i + rows, None] + np.arange(length + 1)]


def train(
    config: perparam.models.Qwen3Config,
    policy: perparam.Policy,
    recipe: Recipe,
    tokens: np.ndarray,
    validation: tuple[np.ndarray, int],
    *,
    length: int = LENGTH,
) -> tuple[perparam.models.Qwen3, History]:
    """`(model, history)` of a model trained from scratch.

    tokens      (length,) int32, the training text
    validation  ids and bytes of the validation text, which follows the training text
    """
    graphdef, initial = nnx.split(perparam.models.Qwen3(config, policy=policy, rngs=nnx.Rngs(0)))
    parameters = nnx.as_pure(initial)
    transformation = perparam.training.with_policy(optimizer(recipe), policy)
    state = transformation.init(parameters)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, state, batch):
        def loss(parameters):
            logits = nnx.merge(graphdef, parameters)(batch[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = transformation.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value / jnp.log(2.0)

    history, losses = History(), []
    start, cpu_start = time.perf_counter(), time.process_time()
    rows = batches(tokens, recipe.batch, length)
    for i in range(1, recipe.steps + 1):
        parameters, state, value = step(parameters, state, next(rows))
        losses.append(value)
        if i % max(recipe.steps // 20, 1) == 0 or i == recipe.steps:
            bits = bits_per_byte(nnx.merge(graphdef, parameters), tokens, *validation, length=length)
            history.validation.append((i, bits))
            history.seconds, history.cpu = time.perf_counter() - start, time.process_time() - cpu_start
            recent = float(np.mean(jax.device_get(losses[-50:])))
            print(
                f"step {i} of {recipe.steps}, {history.seconds:.0f} s, {history.cpu:.0f} s of CPU time: {recent:.3f} "
                f"bits per token of the training text, {bits:.4f} bits per byte of the validation text",
                flush=True,
            )
    history.losses = [round(float(x), 4) for x in jax.device_get(losses)]
    return nnx.merge(graphdef, parameters), history


def bits_per_byte(
    model: perparam.models.Decoder, before: np.ndarray, tokens: np.ndarray, size: int, *, length: int = LENGTH
) -> float:
    """Bits that the model needs for each of the `size` bytes of a text, with its ids (length,).

    before  ids of the text before it, its first context
    length  tokens of a window; windows begin every half of it, so that each token has half a window of context
    """
    half, rows = length // 2, 8
    windows = -(-len(tokens) // half)
    ids = np.zeros(half + 1 + windows * half, np.int32)
    # The first window predicts `half` tokens after `half + 1` of `before`.
    ids[: half + 1] = before[-half - 1 :]
    ids[half + 1 : half + 1 + len(tokens)] = tokens
    real = np.arange(windows * half).reshape(windows, half) < len(tokens)
    windows_of_ids = ids[half * np.arange(windows)[:, None] + np.arange(2 * half + 1)]
    graphdef, state = nnx.split(model)
    nats = 0.0
    for i in range(0, windows, rows):
        batch = windows_of_ids[i : i + rows]
        batch = np.pad(batch, ((0, rows - len(batch)), (0, 0)))
        part = np.asarray(_losses(graphdef, state, batch), np.float64)[: len(real[i : i + rows])]
        nats += float(part[real[i : i + rows]].sum())
    return nats / np.log(2) / size


@functools.partial(jax.jit, static_argnums=0)
def _losses(graphdef: nnx.GraphDef, state: nnx.State, ids: jax.Array) -> jax.Array:
    """Losses (rows, length / 2) float32, in nats, of the second half of the tokens that rows of `length` predict."""
    half = (ids.shape[1] - 1) // 2
    logits = nnx.merge(graphdef, state)(ids[:, :-1])[:, half:].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, half + 1 :])


def kneser_ney_bits(
    vocabulary: int, train: np.ndarray, before: np.ndarray, tokens: np.ndarray, size: int, *, order: int = 5
) -> float:
    """Bits for each of the `size` bytes of a text that a Kneser-Ney model of `train` needs; `before` is its context."""
    context = before[-order + 1 :]
    found = KneserNey(train, vocabulary, order).log2_probabilities(np.concatenate([context, tokens]))
    return -float(found[len(context) :].sum()) / size


def save(model: perparam.models.Qwen3, tokenizer: Any, held_out: str, folder: pathlib.Path) -> None:
    """Writes the checkpoint in bfloat16, its tokenizer and the excerpt into `folder`; other files in it stay."""
    config = dataclasses.replace(model.config, windows=(LENGTH,) * model.config.num_hidden_layers)
    windowed = perparam.models.Qwen3(config, policy=POLICY, rngs=nnx.Rngs(0))
    nnx.update(windowed, nnx.state(model))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        saved = perparam.save_model(windowed, pathlib.Path(work) / "tiny", "bf16", progress=False)
        tiny_text.write_tokenizer(tokenizer, saved)
        excerpt = held_out[: held_out.rindex("\n", 0, EXCERPT) + 1]
        (saved / "held_out.txt").write_text(excerpt, encoding="utf-8")
        for file in saved.iterdir():
            shutil.copyfile(file, folder / file.name)


def write_history(
    history: History, recipe: Recipe, parts: tiny_text.Parts, bits: dict[str, float], folder: Any
) -> None:
    """Writes history.json into `folder`; `bits` are bits per byte of the held-out text by name."""
    contents = {
        "recipe": dataclasses.asdict(recipe),
        "bytes": {name: len(part.encode()) for name, part in parts._asdict().items()},
        "held_out": bits,
        **dataclasses.asdict(history),
    }
    (folder / "history.json").write_text(json.dumps(contents) + "\n", encoding="utf-8")


def main() -> None:
    """Trains, measures and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, help="a UTF-8 text; default: the King James Bible from Debian")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--plot", help="a picture of the training curve; needs matplotlib")
    options = parser.parse_args()
    text = tiny_text.fetched() if options.text is None else options.text.read_text(encoding="utf-8")
    parts = tiny_text.parts(text)
    sizes = [len(part.encode()) for part in parts]
    if min(sizes) == 0:
        parser.error("--text: cannot be divided: write 100 KB or more, with empty lines between chapters")
    tokenizer = tiny_text.trained_tokenizer(parts.train, CONFIG.vocab_size)
    train_ids, validation, held_out = (tiny_text.encoded(tokenizer, part) for part in parts)
    print(
        f"{sizes[0]:,} bytes ({len(train_ids):,} tokens) to train on, {sizes[1]:,} to validate, {sizes[2]:,} held out"
    )
    recipe = Recipe(options.steps)
    model, history = train(CONFIG, POLICY, recipe, train_ids, (validation, sizes[1]))
    save(model, tokenizer, parts.held_out, options.folder)
    saved = perparam.load_model(options.folder, perparam.Policy(compute="f32", output="f32"))
    before = np.concatenate([train_ids, validation])
    octets = [np.frombuffer(part.encode(), np.uint8) for part in parts]
    results = {
        "model": bits_per_byte(saved, before, held_out, sizes[2]),
        "5-gram of tokens": kneser_ney_bits(CONFIG.vocab_size, train_ids, before, held_out, sizes[2]),
        "5-gram of bytes": kneser_ney_bits(256, octets[0], octets[1], octets[2], sizes[2]),
    }
    for name, bits in results.items():
        print(f"held out, {name}: {bits:.4f} bits per byte")
    write_history(history, recipe, parts, results, options.folder)
    if options.plot is not None:
        tiny_card.plot(options.folder, options.plot)
    if options.text is None:
        (options.folder / "README.md").write_text(tiny_card.card(options.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
