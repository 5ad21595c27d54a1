"""What processes that draw begin with, to be imported once by the process that theirs are forked from."""

import torch

torch.set_num_threads(1)  # a process of several must not be forked

from tests.pipelines import picture, tiny_ernie  # noqa: E402

picture(tiny_ernie())
