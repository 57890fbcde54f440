"""The static backend: sessions over preallocated caches, for the dense decoder families it knows.

A Hugging Face forward spends most of a one-token step of a small model on Python, dispatch and cache copies; on a GPU
the host is the bottleneck up to tens of billions of parameters. Here the same weights are run by few operations over
buffers that stay where they are, which is also what CUDA graphs ask for.

    weights    which models qualify, and their tensors, read from the Hugging Face modules by reference
    network    the forward over rows
    rotary     rotary angles by position, and heads rotated by them
    memory     key and value buffers, shared by forks until one of them writes
    attention  rows of a pass against the columns of a cache, in blocks
    judging    the same for the rows of a judge pass, by one of three kernels: a dense mask, `cascade`, `flex`
    session    the backend itself: `StaticSession`
    steps      the decode step in buckets of rows and columns: compiled, and captured in CUDA graphs
    fused      what stands between a layer's products on CUDA, by few `kernels` in Triton
    graphs     CUDA graphs of what runs again and again, the forwards of EAGLE-3's head among it
"""
