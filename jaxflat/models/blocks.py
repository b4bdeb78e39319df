"""Group a model's parameters by block and by kind; traces are measured for each group.

A path names a parameter of Transformer, Lstm, CausalTransformer or Bert. For layer i of a stacked
parameter, "/i" follows the path.
"""

KIND_OF_MODULE = {
    "attention": "attention",
    "mlp_in": "mlp",
    "mlp_gate": "mlp",
    "mlp_out": "mlp",
    "attention_norm": "norm",
    "mlp_norm": "norm",
    "forward": "recurrent",
    "backward": "recurrent",
    "join": "projection",
    "norm": "norm",
}
# Modules of an LSTM's layer that are separate blocks. Other modules form one block a kind.
SEPARATE = ("forward", "backward", "join")


def is_stacked(path: str) -> bool:
    """Return whether a parameter has the leading axis of the scanned layers."""
    return path.startswith("stack/")


def block_of(path: str) -> str:
    """Name the block of a parameter, e.g. "layer_0.attention" for "stack/attention/out/bias/0".

    The scanned layers are layer_0, layer_1, ...; a separate last layer is layer_last. An LSTM's
    layer has the blocks "forward", "backward", "join" and "norm". Outside the layers each
    parameter or module is a block: "token_embedding", "embedding_norm", "final_norm",
    "head_dense", "decoder_bias", ... No block has the name of a kind.
    """
    group, *modules = path.split("/")
    if group not in ("stack", "last"):
        return group
    part = modules[0] if modules[0] in SEPARATE else KIND_OF_MODULE[modules[0]]
    return f"layer_{modules[-1] if group == 'stack' else 'last'}.{part}"


def kind_of(path: str) -> str:
    """Name the kind of a parameter: its role, the same in every layer.

    "bias": every bias, in norms too. "norm": the gains of norms. "attention" and "mlp":
    a transformer's kernels. "recurrent": the kernels of an LSTM's gates. "projection": the kernel
    that joins an LSTM's directions. "head": an untied decoder, and the kernel of BERT's head.
    "embedding": every embedding, a tied decoder included.
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
