"""Arguments about images; nothing here imports PyTorch."""

import math
from collections.abc import Sequence

from ..core.errors import InputError

# what Python may pass where the command line names images, for messages
IMAGE_OBJECTS = "a list of PIL images, a datasets.Dataset or a datasets.DatasetDict"


def check_value_range(values: Sequence[float] | None) -> tuple[float, float] | None:
    """Return the values of black and white in the form that `Preprocessing` takes.

    Raises:
        InputError: if they are not two different finite numbers.
    """
    if values is None:
        return None
    if len(values) != 2 or not all(map(math.isfinite, values)) or values[0] == values[1]:
        raise InputError(
            f"--value_range {' '.join(f'{value:g}' for value in values)}: it takes two different numbers, the values "
            "of black and white, for example --value_range 0 4095."
        )
    return values[0], values[1]
