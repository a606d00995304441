"""An emulator of PTX for Hopper: runs the thread blocks of a compiled kernel on a CPU and reports faults.

ptx              parses the text of a kernel
host             runs the host code of a launch: grid, clusters, arguments and tensor maps
clocks           what each warp knows to have happened: vector clocks
shared           shared memory in which every access is checked for races
tensor_maps      boxes in global and shared memory
barriers         mbarriers, and the barrier of a cluster
operands         registers, constants and addresses
arithmetic       instructions that compute with numbers
moves            instructions that move and convert values
memory           loads and stores
synchronisation  instructions that order what threads do
copies           instructions that copy boxes asynchronously
products         instructions that multiply matrices asynchronously
instructions     the instructions of a program as functions
warpgroup        128 threads that execute the same instructions
machine          thread blocks and clusters, and their scheduler

Values are the hardware's, with two exceptions: the tensor core's sums are rounded once to float32, where the hardware's
float8 sums have about 14 bits, and `div.full` is rounded correctly, where the hardware's may be two ulps off.

A fault is anything that the programming model leaves undefined, whether or not it harms in the schedule that is run.
With two exceptions.  An arrival at the barrier of another block of the cluster orders what came before it in both:
Mosaic GPU and CUTLASS write `mbarrier.arrive.shared::cluster` for this, which is documented to do so in one block alone
unless its scope is said to be the cluster.  And a thread that has waited for a matrix product knows it to be complete
in all four warps: PTX has one group of products for a warpgroup, and in clusters Pallas and CUTLASS let one thread of
it release operands after its own wait.
"""
