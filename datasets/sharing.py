"""Objects whose arrays data-loader workers share."""

from functools import partial
from typing import Any

import numpy as np
import torch


class SharedArrays:
    """Pickles numpy attributes as shared tensors: a spawned worker maps them and copies nothing.

    Arrays that are mapped from a file are mapped again.
    """

    def __getstate__(self) -> dict[str, Any]:
        attributes = vars(self)
        if "_shared" not in attributes:
            shared = {}
            for name, value in attributes.items():
                if isinstance(value, np.ndarray) and not isinstance(value, np.memmap):
                    shared[name] = torch.tensor(value)
                    if value.size:
                        shared[name].share_memory_()
            attributes.update({name: tensor.numpy() for name, tensor in shared.items()})
            attributes["_shared"] = shared
        state = attributes | attributes["_shared"]
        del state["_shared"]
        for name, value in state.items():
            if isinstance(value, np.memmap):
                state[name] = partial(
                    np.memmap, value.filename, value.dtype, "r", value.offset, value.shape
                )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value = value.numpy()
            vars(self)[name] = value() if isinstance(value, partial) else value
