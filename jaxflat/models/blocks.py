"""How the transformer's parameters group into blocks, for traces block by block."""

KIND_OF_MODULE = {
    "attention": "attention",
    "mlp_in": "mlp",
    "mlp_out": "mlp",
    "attention_norm": "norm",
    "mlp_norm": "norm",
}


def is_stacked(path: str) -> bool:
    """Say whether a parameter carries the leading axis of the scanned layers."""
    return path.startswith("stack/")


def block_of(path: str) -> str:
    """Name the block of a parameter, e.g. "layer_0.attention" for "stack/attention/out/bias/0".

    The scanned layers are layer_0, layer_1, ...; the one after them is layer_last. Outside the
    layers each parameter is its own block: "token_embedding", "final_norm", "decoder_bias", ...
    """
    group, *modules = path.split("/")
    if group == "stack":
        return f"layer_{modules[-1]}.{KIND_OF_MODULE[modules[0]]}"
    return f"layer_last.{KIND_OF_MODULE[modules[0]]}" if group == "last" else group
