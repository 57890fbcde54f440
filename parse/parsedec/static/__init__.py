"""The static backend: sessions over preallocated caches, for the dense decoder families it knows.

Of a one-token step of a small model, a Hugging Face forward spends most on Python, dispatch and copies of the cache; on
a GPU the host is the bottleneck up to tens of billions of parameters. Here few operations run the same weights over
buffers that stay where they are, which is also what CUDA graphs need.

    weights    which models qualify, and their weights: the Hugging Face modules' own tensors
    network    the forward over the rows of a pass
    rotary     rotary angles by position, and heads rotated by them
    memory     key and value buffers, shared by forks until one of them writes
    attention  rows of a pass against the columns of a cache
    judging    the same for judge passes, by one of three kernels: a dense mask, `cascade`, `flex`
    session    the backend itself: `StaticSession`
    joint      one forward for the passes of several requests
    steps      decode steps in buckets of rows and columns, so that they can be compiled and captured in CUDA graphs
    fused      on CUDA, everything between a layer's matrix products, by a few Triton `kernels`
    graphs     CUDA graphs, for decode steps and for EAGLE-3's head
"""
