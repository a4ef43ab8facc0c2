"""Fast paths for running an encoded weight without decoding it: the table `ROWS` of choice.py, chosen by measuring.

A kernel is only used where it computes what the reference computes, `F.linear(activation.fake_quantize(x),
weight.decode())`, up to float rounding in the last step; those for integer inputs (dot.py, int8.py) give the same bits.
Float inputs meet weights that are unpacked in registers (unpack.py); only a model that runs in bfloat16 gets the
kernels that multiply in it (bf16.py): `tersor.load(folder, dtype=torch.bfloat16)`.

Where several fit, each runs a few times on the first input of its shape, and the fastest is kept for all sites of that
shape; numbers of tokens are taken together up to the next power of two. One whose result strays from the reference
beyond rounding is left out. What a kernel needs laid out in another order than it is stored in lies in memory beside
the weight, only for kernels that were chosen. Under `torch.compile` nothing is measured: int8 inputs take `int_mm`, all
others are decoded, by code that the compiler fuses.

`reference()` switches all of them off, to judge them and to count operations.
"""

from tersor.kernels.choice import KernelTiming as KernelTiming
from tersor.kernels.choice import WeightKernels as WeightKernels
from tersor.kernels.choice import again as again
from tersor.kernels.choice import choices as choices
from tersor.kernels.choice import fast as fast
from tersor.kernels.choice import kernel_of as kernel_of
from tersor.kernels.choice import linear as linear
from tersor.kernels.choice import reference as reference
from tersor.kernels.choice import transformed as transformed
