"""What the tests of engines have done with PyTorch, which takes a worker process seconds to import."""

import torch


def square(task: int, send) -> None:
    send(("threads", torch.get_num_threads()))
    send(("square", task * task))
