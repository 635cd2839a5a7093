"""What autograd keeps of a forward pass, read off the graph itself: slow, obvious, independent of the client."""

import torch


def kept_for_backward(loss, model):
    """Bytes of the storages that the graph behind `loss` holds and that are none of the model's own.

    Python's numbers (`2 * tensor`) are not counted: autograd hands them to nobody as tensors.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    nodes, waiting, storages = set(), [loss.grad_fn], {}
    while waiting:
        node = waiting.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        waiting += [above for above, _ in node.next_functions]
        found = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        found += getattr(node, "saved_tensors", ())
        for tensor in found:
            if isinstance(tensor, torch.Tensor) and not (tensor.dim() == 0 and tensor.dtype is torch.float64):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return sum(storage.nbytes() for place, storage in storages.items() if place not in own)


def stored_bytes(model):
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
