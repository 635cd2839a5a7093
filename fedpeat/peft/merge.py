"""The tuning folded into the model's own weights."""

import warnings
from copy import deepcopy

from torch import nn

from fedpeat.peft.precision import make_uniform
from fedpeat.peft.tuned import Tuned


def merged_model(tuned: Tuned) -> nn.Module | None:
    """Return a copy of the model with what was trained folded into its weights, in the model's own dtype.

    Args:
        tuned: A tuned model; it stays as it is.

    Returns:
        The plain model, or None where the method cannot be folded (prompts, methods without a merge).
    """
    if tuned.prompt_tokens:
        return None
    if tuned.wrapper is None:
        model = deepcopy(tuned.model)
    else:
        tuner = deepcopy(tuned.wrapper).base_model
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = tuner.merge_and_unload()  # type: ignore[operator]
        except (NotImplementedError, AttributeError, ValueError, RuntimeError):
            return None  # this type of HF peft has no merge
    make_uniform(model)
    return model.requires_grad_(False).eval()
