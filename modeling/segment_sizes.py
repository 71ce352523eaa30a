"""Tokens that a mixer works on at a time: for those that compute, and for the plan, which may import no torch."""

# In plain torch: bounds what the convolution and the scan hold, whatever the length of the call.
SEGMENT = 512
# Where autograd keeps all that is computed: nothing to bound, but what one step leaves is in the cache for the next.
KEPT_SEGMENT = 256
# On the kernels: likewise, and so long that the launches of a call are few beside its work.
KERNEL_SEGMENT = 32768
# One block of the matrix form of the scan in plain torch. The work inside a block grows with this length, the number of
# states handed from block to block shrinks with it; 64 is where a CPU is fastest at the head sizes of the published
# models.
SCAN_CHUNK = 64
