"""An emulator of PTX for Hopper: runs the thread blocks of a compiled kernel on a CPU and reports faults.

ptx          parses the text of a kernel
host         runs the host code of a launch: grid, arguments and tensor maps
clocks       what each warp knows to have happened: vector clocks
shared       shared memory in which every access is checked for races
tensor_maps  copies of boxes between global and shared memory
barriers     mbarriers
arithmetic   instructions without effects beyond a register
effects      instructions that access memory, synchronise or start something asynchronous
machine      the scheduler of a thread block

Values are the hardware's, with two exceptions: the tensor core's sums are rounded once to float32, where the hardware's
float8 sums have about 14 bits, and `div.full` is rounded correctly, where the hardware's may be two ulps off.

A fault is anything that the programming model leaves undefined, whether or not it harms in the schedule that is run.
Clusters are not supported.
"""
