"""How a model's parameters group into blocks and kinds, for traces of each.

The paths are those of Transformer, Lstm, CausalTransformer and Bert; layer i of a stacked
parameter has its path with "/i" behind.
"""

KIND_OF_MODULE = {
    "attention": "attention",
    "mlp_in": "mlp",
    "mlp_out": "mlp",
    "attention_norm": "norm",
    "mlp_norm": "norm",
    "forward": "recurrent",
    "backward": "recurrent",
    "join": "projection",
    "norm": "norm",
}
# Parts of an LSTM's layer that are blocks of their own; a transformer's are called by kind.
APART = ("forward", "backward", "join")


def is_stacked(path: str) -> bool:
    """Say whether a parameter carries the leading axis of the scanned layers."""
    return path.startswith("stack/")


def block_of(path: str) -> str:
    """Name the block of a parameter, e.g. "layer_0.attention" for "stack/attention/out/bias/0".

    The scanned layers are layer_0, layer_1, ...; the one after them, if any, is layer_last. Of an
    LSTM's layer "forward", "backward" and "join" are the blocks beside "norm". Outside the layers
    each parameter or module is its own block: "token_embedding", "embedding_norm", "final_norm",
    "head_dense", "decoder_bias", ...; none is called as a kind is.
    """
    group, *modules = path.split("/")
    if group not in ("stack", "last"):
        return group
    part = modules[0] if modules[0] in APART else KIND_OF_MODULE[modules[0]]
    return f"layer_{modules[-1] if group == 'stack' else 'last'}.{part}"


def kind_of(path: str) -> str:
    """Name the kind of a parameter: "embedding", "norm", "bias", "head", or a kernel's in layers.

    Every bias is a "bias", whatever its module; "norm" is the gains of layer norms. Kernels in
    layers are "attention" and "mlp", of an LSTM "recurrent" (all that its gates read by) and
    "projection" (which joins its directions). "head" is what follows the layers: an untied
    decoder, BERT's dense kernel; a tied decoder is an "embedding".
    """
    names = path.split("/")
    parameter = names[-2] if names[-1].isdigit() else names[-1]
    if parameter in ("bias", "decoder_bias"):
        return "bias"
    if parameter == "scale":
        return "norm"
    if parameter.endswith("_embedding"):
        return "embedding"
    return "head" if names[0] in ("head_dense", "decoder") else KIND_OF_MODULE[names[1]]
