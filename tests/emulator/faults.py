"""What a kernel must not do."""


class Fault(Exception):
    """The kernel's behaviour is undefined, or it does not end."""


class Race(Fault):
    """Two accesses of the same memory or register are in no order."""


class Deadlock(Fault):
    """Every warpgroup waits for something that cannot happen any more."""


class Misaligned(Fault):
    """An address is no multiple of what the instruction requires."""


class OutOfBounds(Fault):
    """An address is outside of the memory that was allocated."""


class Unfinished(Fault):
    """The thread block ends with a barrier in the middle of a phase, or with a copy in flight."""


class Undefined(Fault):
    """A register or shared memory is read that nobody has written."""
