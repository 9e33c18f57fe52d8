"""The Triton backend: any GPU that Triton supports.

No host synchronisation, nothing but allocations and launches on the current stream, so that a call
can be captured in a CUDA graph. With TRITON_INTERPRET=1 in the environment before the first import,
tensors on the CPU go through Triton's interpreter, which is how the kernels are tested where there
is no GPU.
"""
