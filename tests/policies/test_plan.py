"""The plan: rows, totals and JSON, from arrays, shapes and Flax trees."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import planted
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from matmuls import ON_CPU, Case
from plans import TREE, YAML

from perparam import Policy, get_policy, init
from perparam.policies import InvalidScale, UnknownTarget, UnpairedScale, check_records
from perparam.policies.errors import InvalidSharding
from perparam.policies.matmul import IMPLEMENTATIONS, trials
from perparam.policies.native import library

F32, BF16, F8 = np.dtype("float32"), np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def rows_of(plan) -> dict:
    return {row.path: dataclasses.asdict(row) for row in plan.rows}


class TestRows:
    def test_every_column_of_every_row(self):
        kernel = {
            "shape": (200, 300),
            "current": F32,
            "storage": F8,
            "compute": None,
            "storage_rule": "kernel",
            "storage_source": "p.yaml:2",
            "compute_rule": "kernel",
            "compute_source": "p.yaml:7",
            "change": "quantised",
            "bytes_before": 240_000,
            "bytes": 60_000,
        }
        made = kernel | {
            "shape": (2, 3),
            "current": None,
            "storage": BF16,
            "storage_rule": "scale_inv",
            "storage_source": "p.yaml:3",
            "compute_rule": None,
            "compute_source": None,
            "change": "made",
            "bytes_before": 0,
            "bytes": 12,
        }
        bias = {
            "shape": (200,),
            "current": F32,
            "storage": BF16,
            "compute": F32,
            "storage_rule": "default",
            "storage_source": "p.yaml:5",
            "compute_rule": "default",
            "compute_source": "p.yaml:8",
            "change": "cast",
            "bytes_before": 800,
            "bytes": 400,
        }
        embedding = bias | {
            "shape": (10, 4),
            "current": BF16,
            "storage_rule": "embedding",
            "storage_source": "p.yaml:4",
            "change": "kept",
            "bytes_before": 80,
            "bytes": 80,
        }
        # Integers are never cast: the defaults, which reach everything, do not decide for them.
        steps = dict.fromkeys(bias) | {"shape": (3,), "current": np.dtype("int32"), "storage": np.dtype("int32")}
        steps |= {"change": "kept", "bytes_before": 12, "bytes": 12}
        plan = Policy.loads(YAML, "p.yaml").explain(TREE)
        expected = {
            "dense/bias": bias,
            "dense/kernel": kernel,
            "dense/scale_inv": made,
            "embed/embedding": embedding,
            "steps": steps,
        }
        rows = rows_of(plan)
        formats = {path: (row.pop("format"), row.pop("compute_format")) for path, row in rows.items()}
        others = dict.fromkeys(("matmul", "matmul_refused", "matmul_checks", "device_bytes", "training"))
        assert rows == {path: {"path": path, **others, **row} for path, row in expected.items()}
        assert formats == {
            "dense/bias": ("bf16", "f32"),
            "dense/kernel": ("f8_e4m3fn", None),
            "dense/scale_inv": ("bf16", None),
            "embed/embedding": ("bf16", "f32"),
            "steps": ("i32", None),
        }
        assert (plan.activations, plan.output) == (F32, np.dtype("float16"))

    def test_scales_follow_their_kernel(self):
        paths = [row.path for row in Policy(params={"kernel": "f8_e4m3fn"}).explain(TREE).rows]
        assert paths.index("dense/scale_inv") == paths.index("dense/kernel") + 1

    def test_a_rule_given_in_python_has_no_source(self):
        row = Policy(params={"kernel": "bf16"}).explain(TREE).rows[1]
        assert (row.path, row.storage_rule, row.storage_source) == ("dense/kernel", "kernel", None)

    def test_a_parameter_that_no_rule_reaches_has_none(self):
        row = Policy(params={"kernel": "bf16"}).explain(TREE).rows[0]
        assert (row.path, row.storage, row.storage_rule, row.compute, row.compute_rule) == (
            "dense/bias",
            F32,
            None,
            None,
            None,
        )

    def test_an_optional_rule_is_named_as_it_is_written(self):
        rows = rows_of(
            get_policy("fp8_weight_only").explain({"lm_head": {"kernel": TREE["dense"]["kernel"]}, "a": TREE["dense"]})
        )
        assert rows["lm_head/kernel"]["storage_rule"] == "{lm_head,score}/kernel?"
        assert rows["lm_head/kernel"]["storage_source"] == "fp8_weight_only.yaml:3"

    def test_a_stored_pair_has_two_rows(self):
        stored = Policy(params={"kernel": "f8_e4m3fn"}).store(TREE)
        rows = rows_of(Policy(compute="bf16").explain(stored))
        kernel, scales = rows["dense/kernel"], rows["dense/scale_inv"]
        assert (kernel["current"], kernel["storage"], kernel["change"], kernel["bytes"]) == (F8, F8, "kept", 60_000)
        assert (scales["current"], scales["storage"], scales["change"], scales["bytes"]) == (F32, F32, "kept", 24)
        assert scales["compute"] is scales["compute_rule"] is None

    def test_a_dissolved_scale_says_so_and_takes_nothing(self):
        stored = Policy(params={"kernel": "f8_e4m3fn"}).store(TREE)
        plan = Policy(params="bf16").explain(stored)
        rows = rows_of(plan)
        kernel, scales = rows["dense/kernel"], rows["dense/scale_inv"]
        assert (kernel["change"], kernel["storage"], kernel["bytes_before"], kernel["bytes"]) == (
            "dequantised",
            BF16,
            60_000,
            120_000,
        )
        assert (scales["change"], scales["storage"], scales["bytes_before"], scales["bytes"]) == (
            "dissolved",
            None,
            24,
            0,
        )
        assert (scales["storage_rule"], scales["compute_rule"]) == (None, None)
        assert plan.total_bytes == sum(x.nbytes for x in jax.tree.leaves(Policy(params="bf16").store(stored)))

    def test_a_requantised_pair_says_so(self):
        stored = Policy(params={"kernel": "f8_e4m3fn"}).store(TREE)
        rows = rows_of(Policy(params={"kernel": "int8"}).explain(stored))
        assert rows["dense/kernel"]["change"] == rows["dense/scale_inv"]["change"] == "requantised"

    def test_the_plan_is_what_storing_does(self):
        policy = Policy.loads(YAML)
        stored = {
            jax.tree_util.keystr(path, simple=True, separator="/"): (x.shape, x.dtype, x.nbytes)
            for path, x in jax.tree.leaves_with_path(policy.store(TREE))
        }
        assert {row.path: (row.shape, row.storage, row.bytes) for row in policy.explain(TREE).rows} == stored

    def test_a_row_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            Policy().explain(TREE).rows[0].bytes = 0


_GENERIC = "fused reduction | widen, then dot"


class TestTarget:
    """With a target a plan says what multiplies with each kernel there; the machine it is made on does not matter."""

    tree = TREE | {"wide": {"kernel": np.ones((256, 384), np.float32)}}

    @pytest.mark.parametrize(
        ("target", "compute", "wide", "ragged", "reason"),
        [
            ("cpu", "null", ON_CPU, ON_CPU, ""),
            ("cuda:9.0", "null", "hopper columns", _GENERIC, ""),
            ("cuda:9.0", "f8_e4m3fn", "hopper columns | hopper rows", _GENERIC, ""),
            ("cuda:8.0", "null", _GENERIC, _GENERIC, "cuda:8.0"),
            ("cuda", "null", _GENERIC, _GENERIC, "cuda of unknown compute capability"),
            ("tpu", "bf16", _GENERIC, _GENERIC, "tpu"),
        ],
    )
    def test_kernels_have_an_implementation_or_a_reason(self, target, compute, wide, ragged, reason):
        policy = Policy.loads(
            YAML.replace("kernel: null", f"kernel: {compute}").replace("default: f32", "default: bf16")
        )
        plan = policy.explain(self.tree, target=target)
        found = {row.path: row.matmul for row in plan.rows if row.matmul is not None}
        assert found == {"dense/kernel": ragged, "wide/kernel": wide}
        why = {row.path: row.matmul_refused for row in plan.rows if row.matmul_refused is not None}
        served = {"cuda:9.0": {"wide/kernel"}, "cpu": set(found) if ON_CPU == "native" else set()}
        assert set(why) == set(found) - served.get(target, set())
        names = "hopper widened or hopper rows or hopper columns"
        assert (f"\ndense/kernel: not {names}: " in str(plan)) == (target == "cuda:9.0")
        nothing = f"\ndense/kernel and 1 more: no implementation is made for {reason}\n"
        assert (nothing in str(plan)) == bool(reason)
        assert "matmul (1 | 512 rows)" in str(plan).splitlines()[0]
        assert f"  {wide}  " in str(plan)
        assert [row["matmul"] for row in json.loads(plan.to_json())["rows"]] == [row.matmul for row in plan.rows]

    def test_a_cpu_without_the_native_library_has_the_reason(self, monkeypatch):
        monkeypatch.setattr(library, "unavailable", lambda: "it is not here")
        plan = Policy.loads(YAML).explain(self.tree, target="cpu")
        assert {row.matmul for row in plan.rows if row.matmul is not None} == {"slabs"}
        assert "\ndense/kernel and 1 more: not native: it is not here\n" in str(plan)

    def test_a_kernel_that_needs_no_implementation_of_its_own_has_no_reason(self):
        plan = Policy().explain(self.tree, target="tpu")
        assert {(row.matmul, row.matmul_refused) for row in plan.rows} == {("dot", None), (None, None)}

    def test_kernels_of_another_machine_are_unchecked(self):
        policy = Policy.loads(YAML.replace("compute:\n  kernel: null", "compute:\n  kernel: f8_e4m3fn"))
        plan = policy.explain(self.tree, target="cuda:9.0")
        names = "hopper columns and hopper rows and hopper quantisation"
        why = f"{names} unchecked: this process has no device cuda:9.0 to compare it on"
        assert {row.matmul_checks for row in plan.rows} == {None, why}
        assert str(plan).count(f"\n{why}\n") == 1

    def test_kernels_of_this_machine_are_as_their_checks_found(self, tmp_path):
        policy = Policy.loads(YAML.replace("default: f32", "default: bf16"))
        with planted.device(tmp_path):
            for rows, difference in ((1, None), (512, "the product is 1 instead of 2")):
                call = Case(rows).call
                trial = trials.of_product(IMPLEMENTATIONS["hopper columns"], call)
                found = check_records.Verdict(difference)
                check_records.write("a device", trial.kernel, trial.kind, found)
            (row,) = (row for row in policy.explain(self.tree, target="cuda:9.0").rows if row.path == "wide/kernel")
        assert row.matmul == "hopper columns | widen, then dot"
        assert row.matmul_checks == (
            "hopper columns checked: it agrees with the reference on this device; "
            "hopper columns refused: on this device the product is 1 instead of 2"
        )

    def test_without_one_there_is_no_column(self):
        plan = Policy.loads(YAML).explain(self.tree)
        assert "matmul (" not in str(plan)
        assert not any(row.matmul for row in plan.rows)

    def test_one_that_nobody_knows(self):
        with pytest.raises(
            UnknownTarget, match=r"'gpu' is not a target. Write here, cpu, tpu, rocm, cuda, or cuda:9.0"
        ):
            Policy.loads(YAML).explain(self.tree, target="gpu")


class TestTotals:
    plan = Policy.loads(YAML).explain(TREE)

    def test_by_dtype_the_largest_first(self):
        assert list(self.plan.bytes_by_dtype.items()) == [(F8, 60_000), (BF16, 12 + 400 + 80), (np.dtype("int32"), 12)]

    def test_before_and_after(self):
        assert self.plan.total_bytes_before == 240_000 + 800 + 80 + 12
        assert self.plan.total_bytes == 60_000 + 12 + 400 + 80 + 12

    def test_of_nothing(self):
        plan = Policy("f32").explain({})
        assert (plan.rows, plan.total_bytes, plan.bytes_by_dtype) == ((), 0, {})


class TestShardings:
    """`explain` with shardings: the bytes on each device."""

    mesh = jax.sharding.AbstractMesh((2, 4), ("d", "t"))

    def sharded(self, *names):
        return NamedSharding(self.mesh, PartitionSpec(*names))

    def test_each_device_has_its_part_of_each_array(self):
        where = dict.fromkeys(("dense/bias", "dense/scale_inv", "embed/embedding", "steps"), self.sharded())
        where |= {"dense/kernel": self.sharded("t", "d"), "steps": None}
        plan = Policy.loads(YAML).explain(TREE, sharding=where)
        found = {row.path: row.device_bytes for row in plan}
        assert found == {
            "dense/bias": 400, "dense/kernel": 60_000 // 8, "dense/scale_inv": 12, "embed/embedding": 80, "steps": 12,
        }  # fmt: skip
        assert plan.device_bytes == json.loads(plan.to_json())["device_bytes"] == sum(found.values())
        assert plan.to_text().splitlines()[0].endswith("bytes  per device")
        assert "\non each device: 7.8 KiB\n" in plan.to_text()

    def test_a_function_gets_shapes_and_formats_after_storage(self):
        def everywhere(stored):
            assert stored["dense/scale_inv"].shape == (2, 3)
            return dict.fromkeys(stored, self.sharded())

        plan = Policy.loads(YAML).explain(TREE, sharding=everywhere)
        assert plan.device_bytes == plan.total_bytes

    def test_scales_that_storage_removes_are_on_no_device(self):
        stored = Policy.loads(YAML).store(TREE)
        plan = Policy("f32").explain(stored, sharding=lambda paths: dict.fromkeys(paths))
        assert {row.path: row.device_bytes for row in plan}["dense/scale_inv"] == 0
        assert plan.device_bytes == plan.total_bytes

    def test_an_array_without_a_sharding_is_an_error(self):
        with pytest.raises(InvalidSharding, match=r"dense/bias: no sharding\. Pass one for every parameter"):
            Policy.loads(YAML).explain(TREE, sharding={"dense/kernel": None})

    def test_without_shardings_there_is_no_column(self):
        plan = Policy.loads(YAML).explain(TREE)
        assert plan.device_bytes is None
        assert "device" not in plan.to_text()


class TestJson:
    def test_is_the_rows_and_the_totals(self):
        plan = Policy.loads(YAML, "p.yaml").explain(TREE)
        read = json.loads(plan.to_json())
        assert read["rows"][1] == {
            "path": "dense/kernel",
            "shape": [200, 300],
            "current": "f32",
            "storage": "f8_e4m3fn",
            "format": "f8_e4m3fn",
            "compute": None,
            "compute_format": None,
            "storage_rule": "kernel",
            "storage_source": "p.yaml:2",
            "compute_rule": "kernel",
            "compute_source": "p.yaml:7",
            "change": "quantised",
            "bytes_before": 240_000,
            "bytes": 60_000,
            "matmul": None,
            "matmul_refused": None,
            "matmul_checks": None,
            "device_bytes": None,
        }
        assert len(read["rows"]) == len(plan.rows)
        assert read["bytes"] == plan.total_bytes
        assert read["bytes_before"] == plan.total_bytes_before
        assert read["bytes_by_dtype"] == {"f8_e4m3fn": 60_000, "bf16": 492, "i32": 12}
        assert (read["activations"], read["output"]) == ("f32", "f16")

    def test_of_nothing_is_json_too(self):
        assert json.loads(Policy().explain({}).to_json())["rows"] == []

    def test_is_the_same_each_time(self):
        assert Policy.loads(YAML).explain(TREE).to_json() == Policy.loads(YAML).explain(TREE).to_json()

    def test_a_changed_parameter_is_one_changed_line(self):
        other = TREE | {"embed": {"embedding": np.ones((10, 4), np.float32)}}
        lines = [Policy(params={"kernel": "bf16"}).explain(tree).to_json().splitlines() for tree in (TREE, other)]
        assert len(lines[0]) == len(lines[1])
        changed = [(a, b) for a, b in zip(*lines, strict=True) if a != b]
        assert len(changed) == 2  # the row, and the totals
        assert "embed/embedding" in changed[0][0]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])


class TestTrees:
    policy = Policy(params={"kernel": "f8_e4m3fn"}, compute="bf16", output="f32")

    def test_shapes_are_enough(self):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
        assert self.policy.explain(shapes) == self.policy.explain(TREE)

    def test_jax_arrays_are_like_numpys(self):
        assert self.policy.explain(jax.tree.map(jnp.asarray, TREE)) == self.policy.explain(TREE)

    def test_linen_variables_and_their_shapes(self):
        x = np.ones((1, 4), np.float32)
        variables = Linen().init(jax.random.key(0), x)
        plan = self.policy.explain(variables)
        assert [row.path for row in plan.rows] == [
            "BatchNorm_0/bias",
            "BatchNorm_0/scale",
            "Dense_0/bias",
            "Dense_0/kernel",
            "Dense_0/scale_inv",
        ]
        assert self.policy.explain(jax.eval_shape(Linen().init, jax.random.key(0), x)) == plan
        assert self.policy.explain(variables["params"]) == plan

    def test_an_nnx_model_its_state_and_its_shapes(self):
        model = Nnx(nnx.Rngs(0))
        plan = self.policy.explain(model)
        assert [row.path for row in plan.rows] == [
            "layers/0/bias",
            "layers/0/kernel",
            "layers/0/scale_inv",
            "layers/1/bias",
            "layers/1/scale",
        ]
        assert self.policy.explain(nnx.state(model)) == plan
        assert self.policy.explain(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))) == plan

    def test_what_init_returned(self):
        plan = self.policy.explain(init(Nnx, self.policy, jax.random.key(0)))
        assert {row.change for row in plan.rows} == {"kept"}

    def test_a_block_that_a_tree_knows_is_that_of_the_plan(self):
        state = init(Nnx, Policy(params={"kernel": "f8_e4m3fn"}, block=(2, 2)), jax.random.key(0))
        assert rows_of(Policy().explain(state))["layers/0/scale_inv"]["shape"] == (2, 2)

    def test_half_pairs_and_grids_are_checked_by_shape(self):
        kernel, scales = jax.ShapeDtypeStruct((4, 4), F8), jax.ShapeDtypeStruct((2, 2), F32)
        with pytest.raises(UnpairedScale, match="a/kernel: f8_e4m3fn"):
            Policy().explain({"a": {"kernel": kernel}})
        with pytest.raises(InvalidScale, match=r"a/scale_inv: scales of shape \(2, 2\)"):
            Policy().explain({"a": {"kernel": kernel, "scale_inv": scales}})
