"""The emulator of PTX, by small programs: results of instructions, and the faults that it has to report."""

import ml_dtypes
import numpy as np
import pytest
from emulator import faults, host, instructions, machine, ptx
from emulator.tensor_maps import Global, TensorMap

HEAD = """
.visible .entry kernel(.param .u64 .ptr .align 256 kernel_param_0,
	.param .align 64 .b8 kernel_param_1[128]
)
.maxntid {threads}, 1, 1
$L__func_begin0:
    mov.u32 %tid, %tid.x;
    setp.eq.u32 %first, %tid, 0;
    mov.b64 %base, __dynamic_shmem__0;
"""
TILE = TensorMap(1 << 40, 1, (60, 128), (128, 1), (64, 128), 128)
"""Boxes of 64 rows, of a tensor of 60."""

INIT = "@%first mbarrier.init.shared.b64 [%base+16384], 1; fence.mbarrier_init.release.cluster; bar.sync 0;"
COPY = """
@%first mbarrier.arrive.expect_tx.shared.b64 %state, [%base+16384], 8192;
mov.b64 %map, kernel_param_1; mov.b32 %zero, 0;
@%first cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%base+{at}],
    [%map, {{%zero,%zero}}], [%base+16384];
"""
WAIT = "mbarrier.try_wait.parity.shared.b64 %done, [%base+16384], 0, 10000000;"
ADDRESS = "mul.wide.u32 %offset, %tid, 4; add.s64 %place, %base, %offset;"
OUT = "ld.param.b64 %out, [kernel_param_0]; add.s64 %out, %out, %offset; st.global.b32 [%out], %value;"


def run(body: str, threads: int = 128, blocks: int = 1, schedule: int = 0) -> np.ndarray:
    """Runs a cluster, and returns the values (threads,) that its threads write; the tile is 0, 1, … 255, 0, …"""
    program = ptx.parse(HEAD.format(threads=threads) + body + "ret;\n$L__func_end0:")
    tile, out = np.arange(60 * 128).astype(np.uint8), np.zeros(4 * threads * blocks, np.uint8)
    memory = Global([tile, out])
    grid = (blocks, 1, 1)
    launch = host.Launch(grid, 16384 + 64, (memory.addresses[1], {0: TILE}), grid)
    machine.Cluster(program, instructions.compile_program(program), launch, (0, 0, 0), memory).run(schedule)
    return out.view(np.uint32)


def test_a_copy_is_swizzled_and_clipped():
    swizzled = run(INIT + COPY.format(at=0) + WAIT + ADDRESS + "ld.shared.b32 %value, [%place+128];" + OUT)
    tile = np.zeros((64, 128), np.uint8)
    tile[:60] = np.arange(60 * 128).reshape(60, 128)
    units = tile.reshape(64, 8, 16)[np.arange(64)[:, None], np.arange(8) ^ np.arange(64)[:, None] % 8]
    np.testing.assert_array_equal(swizzled, units.reshape(-1)[128 : 128 + 512].view(np.uint32))
    beyond = run(INIT + COPY.format(at=0) + WAIT + ADDRESS + "ld.shared.b32 %value, [%place+7680];" + OUT)
    assert not beyond.any()


LOAD = "ld.shared.b32 %value, [%place];"
STORE = "st.shared.b32 [%place], %tid;"
COPY_OUT = """
mov.b64 %map, kernel_param_1; mov.b32 %zero, 0;
@%first cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%map, {%zero,%zero}], [%base];
cp.async.bulk.commit_group;
"""
FILL = ADDRESS + "".join(f"st.shared.b32 [%place+{512 * i}], %tid;" for i in range(16))
FENCED = FILL + "fence.proxy.async.shared::cta; bar.sync 0;"


@pytest.mark.parametrize(
    ("body", "fault", "text"),
    [
        (INIT + COPY.format(at=0) + ADDRESS + LOAD + WAIT, faults.Race, "may be writing"),
        (INIT + COPY.format(at=0) + ADDRESS + STORE + WAIT, faults.Race, "may be writing"),
        (INIT + COPY.format(at=0), faults.Unfinished, "in flight"),
        (INIT + COPY.format(at=128) + WAIT, faults.Misaligned, "1024"),
        (INIT + COPY.format(at=16384) + WAIT, faults.OutOfBounds, "shared memory"),
        (INIT + WAIT, faults.Deadlock, "waits"),
        (INIT.replace("fence.mbarrier_init.release.cluster;", "") + COPY.format(at=0), faults.Race, "visible"),
        (ADDRESS + LOAD, faults.Undefined, "nobody has written"),
        (ADDRESS + STORE + "ld.shared.b32 %value, [%base];", faults.Race, "may be writing"),
        (ADDRESS + "st.shared.b32 [%place+2], %tid;", faults.Misaligned, "4 bytes"),
        (FILL + "bar.sync 0;" + COPY_OUT + "cp.async.bulk.wait_group 0;", faults.Race, "without a fence"),
        (FENCED + COPY_OUT, faults.Unfinished, "in flight"),
        (FENCED + COPY_OUT + STORE + "cp.async.bulk.wait_group 0;", faults.Race, "may be reading"),
        ("add.s32 %value, %nothing, 1;", faults.Undefined, "%nothing"),
        ("@%first bra $L__1; add.s32 %value, %tid, 1; $L__1:", faults.Fault, "branches"),
    ],
)
def test_faults(body, fault, text):
    with pytest.raises(fault, match=text):
        run(body)


def test_the_faultless_neighbours_of_those_programs_have_none():
    run(INIT + COPY.format(at=1024) + WAIT + ADDRESS + LOAD.replace("]", "+1024]"))
    run(FENCED + COPY_OUT + "cp.async.bulk.wait_group 0; bar.sync 0;" + STORE)
    run(ADDRESS + STORE + "bar.sync 0; ld.shared.b32 %value, [%base];")


MEET = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"
CLUSTER = (
    """
@%first mbarrier.init.shared.b64 [%base+16384], 1;
@%first mbarrier.init.shared.b64 [%base+16392], 2;
fence.mbarrier_init.release.cluster;"""
    + MEET
    + """
mov.u32 %rank, %cluster_ctarank; mul.wide.u32 %half, %rank, 8192; add.s64 %slot, %base, %half;
cvt.u32.u64 %empty, %base; add.s32 %empty, %empty, 16392;
"""
)
SHARE = """
@%first mbarrier.arrive.expect_tx.shared.b64 %state, [%base+16384], 16384;
mov.b64 %map, kernel_param_1; mov.b32 %zero, 0; mov.b32 %row, %rank; mov.b16 %both, 3;
@%first cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
    [%slot], [%map, {%zero,%row}], [%base+16384], %both;
"""
READ = ADDRESS + "ld.shared.b32 %low, [%place]; ld.shared.b32 %high, [%place+8192];"
USE = CLUSTER + SHARE + WAIT + READ
RELEASE = """
bar.sync 0; setp.lt.u32 %two, %tid, 2;
@%two mapa.shared::cluster.u32 %there, %empty, %tid;
@%two mbarrier.arrive.shared::cluster.b64 _, [%there];
"""
RELEASED = "mbarrier.try_wait.parity.shared.b64 %done, [%base+16392], 0, 10000000;"
AGAIN = SHARE + WAIT.replace(", 0,", ", 1,")
SHARED_OUT = "mad.lo.u32 %place, %rank, 128, %tid; mul.wide.u32 %offset, %place, 4; sub.s32 %value, %high, %low;" + OUT


@pytest.mark.parametrize("schedule", range(6))
def test_a_copy_to_both_blocks_of_a_cluster(schedule):
    found = run(USE + RELEASE + RELEASED + SHARED_OUT, blocks=2, schedule=schedule)
    rows = np.arange(5 * 128).astype(np.uint8).reshape(5, 128)  # of which the second block copies those from 1 on
    low, high = (swizzled_rows(rows[start : start + 4]).view(np.uint32) for start in (0, 1))
    np.testing.assert_array_equal(found.reshape(2, 128), np.stack([high - low] * 2))


def swizzled_rows(rows: np.ndarray) -> np.ndarray:
    """The bytes of the first rows of a box, (rows, 128), in the order in which they are in shared memory."""
    units, count = rows.reshape(-1, 8, 16), len(rows)
    return units[np.arange(count)[:, None], np.arange(8) ^ np.arange(count)[:, None] % 8].reshape(-1)


@pytest.mark.parametrize(
    ("body", "fault", "text"),
    [
        (CLUSTER.replace(MEET, "bar.sync 0;") + SHARE + WAIT, faults.Fault, "initiali"),
        (CLUSTER.replace("fence.mbarrier_init.release.cluster;", "") + SHARE + WAIT, faults.Race, "initialisation"),
        (CLUSTER.replace("barrier.cluster.wait.aligned;", "bar.sync 0;") + SHARE + WAIT, faults.Fault, "initiali"),
        ("barrier.cluster.wait.aligned;", faults.Fault, "not arrived"),
        ("barrier.cluster.arrive.aligned; barrier.cluster.arrive.aligned;", faults.Fault, "twice"),
        ("@%first barrier.cluster.arrive.aligned;", faults.Fault, "do not execute"),
        (CLUSTER + SHARE.replace("%both, 3", "%both, 7") + WAIT, faults.Fault, "of which a cluster has 2"),
        (CLUSTER + SHARE, faults.Unfinished, "in flight|middle of a phase"),
        (USE + AGAIN, faults.Race, "may be (reading|writing)"),
        (USE + RELEASE.replace("bar.sync 0;", "") + RELEASED + AGAIN, faults.Race, "warp [1-3]"),
        (USE + RELEASE, faults.Fault, "does not wait|has ended|middle of a phase"),
        (CLUSTER + "mapa.shared::cluster.u32 %there, %empty, 3;", faults.Fault, "2 thread blocks"),
    ],
)
def test_faults_of_clusters(body, fault, text):
    for schedule in range(3):
        with pytest.raises(fault, match=text):
            run(body, blocks=2, schedule=schedule)


def test_warpgroups_that_never_meet_are_a_deadlock():
    with pytest.raises(faults.Deadlock):
        run("setp.lt.u32 %p1, %tid, 128; @%p1 bra $L__1; bar.sync 0; $L__1:", threads=256)


def test_barriers_count_all_arrivals():
    with pytest.raises(faults.Fault, match="2 arrivals"):
        run(INIT + "setp.lt.u32 %two, %tid, 2; @%two mbarrier.arrive.shared.b64 %state, [%base+16384];")


VALUES = np.arange(128, dtype=np.float32) - 64


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shr.s32 %value, %x, 1;", (np.arange(128) - 64) >> 1),
        ("shl.b32 %value, %x, 33;", np.zeros(128, int)),
        ("bfe.s32 %value, %x, 0, 4;", ((np.arange(128) - 64 + 8) & 15) - 8),
        ("bfe.u32 %value, %x, 4, 28;", ((np.arange(128) - 64).astype(np.uint32) >> 4)),
        ("mul.hi.u32 %value, %x, 65536;", (np.arange(128) - 64).astype(np.uint32) >> 16),
        (
            "cvt.u16.u32 %short, %x; mul.hi.u16 %high, %short, 497; cvt.u32.u16 %value, %high;",
            (np.arange(128) - 64).astype(np.uint16).astype(np.uint32) * 497 >> 16,
        ),
        ("prmt.b32 %value, %x, 0, 0x4440;", (np.arange(128) - 64) & 255),
        ("lop3.b32 %value, %x, 255, 15, 0x28;", ((np.arange(128) - 64) ^ 255) & 15),
        ("shfl.sync.bfly.b32 %value, %tid, 4, 31, -1;", np.arange(128) ^ 4),
        ("min.s32 %value, %x, 3;", np.minimum(np.arange(128) - 64, 3)),
    ],
)
def test_integers(code, expected):
    found = run("add.s32 %x, %tid, -64;" + code + "mul.wide.u32 %offset, %tid, 4;" + OUT)
    np.testing.assert_array_equal(found, np.asarray(expected).astype(np.int64) & 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("cvt.rn.bf16x2.f32 %value, %x, %x;", VALUES.astype(ml_dtypes.bfloat16)),
        ("cvt.rn.f16x2.f32 %value, %x, %x;", VALUES.astype(np.float16)),
        ("fma.rn.f32 %value, %x, %x, 0f3F800000;", VALUES * VALUES + 1),
        ("max.f32 %value, %x, 0f00000000;", np.maximum(VALUES, 0)),
        ("setp.gt.f32 %p1, %x, 0f00000000; selp.f32 %value, %x, 0f00000000, %p1;", np.maximum(VALUES, 0)),
    ],
)
def test_floats(code, expected):
    convert = "add.s32 %i, %tid, -64; cvt.rn.f32.s32 %x, %i; mul.wide.u32 %offset, %tid, 4;"
    found = run(convert + code + OUT)
    pairs = np.repeat(expected, 4 // expected.dtype.itemsize)
    np.testing.assert_array_equal(found.view(expected.dtype), pairs)


@pytest.mark.parametrize("of", ["e4m3", "e5m2"])
def test_every_float8_widens_exactly(of):
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[of]
    low = "mad.lo.u32 %pair, %tid, 514, 256; mov.b32 {%low, _}, %pair; mul.wide.u32 %offset, %tid, 4;"  # 2t and 2t + 1
    found = run(low + f"cvt.rn.f16x2.{of}x2 %value, %low;" + OUT).view(np.float16)
    np.testing.assert_array_equal(found, np.arange(256).astype(np.uint8).view(dtype).astype(np.float16))
