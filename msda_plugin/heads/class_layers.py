"""Checkpoints with another number of classes."""

from torch import Tensor, nn

from msda_plugin.heads.set_prediction import SetPrediction


def adapt_class_layers(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, tuple[int, int]]:
    """Replace class layers of another size in ``state_dict``, in place, by those of ``model``.

    Loading the result gives a model with new class layers and the other weights of the checkpoint. Use it to start a
    training; a model that is resumed or tested needs the checkpoint's number of classes.

    Args:
        state_dict: Of a detector; names may start with ``module.``.
        model: A detector with a head of this package.

    Returns:
        Name of each replaced layer, with its number of outputs in the checkpoint and in the model.

    Example:
        >>> adapted = adapt_class_layers(state_dict, model)
        >>> model.load_state_dict(state_dict)
    """
    stored = {name.removeprefix('module.'): name for name in state_dict}
    weights = {name: state_dict[full] for name, full in stored.items()}
    adapted = {}
    for prefix, head in model.named_modules():
        if isinstance(head, SetPrediction):
            adapted |= head.resized_class_layers(weights, f'{prefix}.' if prefix else '')
    for name in adapted:
        for key, value in model.get_submodule(name).named_parameters():
            state_dict[stored[f'{name}.{key}']] = value.detach()
    return adapted
