"""A stand-in for a GPU: `pytest -p cuda_standin -m gpu` runs the CUDA tests where there is no CUDA.

    device    tensors on `cuda` whose memory is the host's: what is on the wrong device is refused as on a GPU
    kernels   what CUDA alone has, and our kernels in Triton, in terms of torch's operations
    runtime   torch.cuda: streams and events that are always done, graphs that are recorded operations (`cuda_graphs`)

So placement, buckets, graphs and fallbacks are tested; speed and concurrency are not, nor are kernels (those in Triton
are by tests/static/test_fused.py). torch.compile hands back what it is given.
"""

from cuda_standin import device

device.load()  # before torch is imported

from cuda_standin import kernels, runtime  # noqa: E402

runtime.install(device.module())
kernels.install()
